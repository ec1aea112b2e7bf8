"""What users do beside training: with several ranks it does what it does in plain PyTorch."""

from typing import Any

import pytest
import torch
from rank_training import TIERS, Training, Where, check_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam


class GradientsRead(Training):
    """Each rank reads gradients before the step, the first one while others may still be in backward."""

    def micro_step(self, number: int) -> None:
        super().micro_step(number)
        if self.rank == 0:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in self.model.parameters())

    def before_update(self, step: int) -> None:
        self.ended.seen.append([p.grad.norm().item() for p in self.model.parameters()])


class GradientsReplaced(Training):
    """In all the ways: clipped by hand, by value, set, given memory, scaled, dropped."""

    def begin_step(self, step: int) -> None:
        if step == 1:
            for parameter in self.model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)

    def before_update(self, step: int) -> None:
        self.ended.seen.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05).item())
        first, second, third, *others = self.model.parameters()
        first.grad = torch.full_like(first, 0.01)
        second.grad = None
        third.grad.mul_(0.5)
        torch.nn.utils.clip_grad_value_(others, 0.01)


class GradientsKept(Training):
    """They are zeroed after one step, and after the next one not at all."""

    def update(self) -> None:
        self.optimizer.step()
        if not self.ended.seen:
            self.optimizer.zero_grad(set_to_none=False)
        self.ended.seen.append(0)


class Edited(Training):
    """Parameters are changed in each way, and read by each before a step could have brought that home."""

    def end_step(self, step: int) -> None:
        first, second, third, *others = self.model.parameters()
        with torch.no_grad():
            first.mul_(0.9)
        second.data = second.detach() + 0.1
        third.data.clamp_(-0.05, 0.05)
        for parameter in others:
            parameter.data.copy_(parameter * 0.9)
        self.ended.seen.append([p.detach().sum().item() for p in self.model.parameters()])
        self.ended.seen.append([value.sum().item() for value in self.model.state_dict().values()])
        for parameter in others:
            self.optimizer.state[parameter]["exp_avg"].mul_(0.5)


class Held(Training):
    """Code outside holds the memory of parameters, and sees each update."""

    def begin_step(self, step: int) -> None:
        if step == 0:
            self.held = [p.data for p in self.model.parameters()]

    def end_step(self, step: int) -> None:
        self.ended.seen.append([held.sum().item() for held in self.held])


class Unfrozen(Training):
    """A layer is frozen at first, and joins the optimizer later."""

    def build(self) -> nn.Module:
        model = super().build()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def begin_step(self, step: int) -> None:
        if step == 1:
            self.model[0].requires_grad_(True)
            self.optimizer.add_param_group({"params": list(self.model[0].parameters()), "lr": 1e-3})


class UnfrozenByFlag(Training):
    """A frozen layer is in the optimizer from the start."""

    micro_batches = 2

    def build(self) -> nn.Module:
        model = super().build()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    def begin_step(self, step: int) -> None:
        self.model[0].requires_grad_(step > 0)


class TiedLater(Training):
    def begin_step(self, step: int) -> None:
        if step == 1:
            self.model[3].weight = self.model[0].weight


class UnlikeOnEachRank(Training):
    """Layers that some micro-batches do not use, other numbers of evaluations, and a rank that saves alone."""

    def build(self) -> nn.Module:
        return Branches(self.width)

    def loss(self, number: int) -> Tensor:
        return self.model(self.batch(number), is_odd=number % 2 == 1).square().mean()  # type: ignore[no-any-return]

    def end_step(self, step: int) -> None:
        self.model.eval()
        with torch.no_grad():
            for number in range(2 * self.rank):
                self.model(self.batch(number), is_odd=True)
        self.model.train()
        if self.rank == 0:
            assert len(self.model.state_dict()) == len(list(self.model.parameters()))


class Branches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.odd, self.never = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, is_odd: bool) -> Tensor:
        return self.odd(self.first(x)) if is_odd else self.first(x)  # type: ignore[no-any-return]


class WithBuffers(Training):
    """Running statistics are each rank's own, as they are with FSDP; what is learned does not depend on them."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.width, self.width), nn.BatchNorm1d(self.width))

    def end(self) -> Any:
        ended = super().end()
        ended.buffers = {}
        return ended


ALWAYS = [
    GradientsRead,
    GradientsReplaced,
    GradientsKept,
    Edited,
    Held,
    Unfrozen,
    UnfrozenByFlag,
    TiedLater,
    UnlikeOnEachRank,
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ALWAYS)
def test_with_two_ranks_it_is_as_in_plain_pytorch(worlds, kind):
    check_exact(worlds(2), kind, **TIERS["streamed"])


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", [*ALWAYS, WithBuffers])
def test_it_is_so_everywhere(worlds, kind, tiers, size):
    check_exact(worlds(size), kind, **TIERS[tiers])


class Renormalising(Training):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(8, self.width, max_norm=1.0))


def boost(kind: type[Training]) -> None:
    kind(Where.RANKS)


def test_weights_that_each_rank_would_change_by_itself_are_refused(worlds):
    for outcome in worlds(2).outcomes(boost, Renormalising):
        assert outcome.error.startswith("ValueError: max_norm in 0 changes weights in each forward")


class SeededByRank(Training):
    def built(self) -> nn.Module:
        torch.manual_seed(self.rank)
        with LazyInitContext():
            return self.build()


class SeededByRankAndLoaded(SeededByRank):
    def build(self) -> nn.Module:
        model = super().build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        return model


def first_weight(kind: type[Training], **plugin: Any) -> Tensor:
    training = kind(Where.RANKS, **plugin)
    return next(training.model.parameters()).detach().clone()


def copied_from_the_first() -> Tensor:
    return first_weight(SeededByRank, sync_module_states=True)


def test_lazy_models_of_different_seeds_are_refused(worlds):
    for outcome in worlds(2).outcomes(first_weight, SeededByRank):
        assert "rank 1 has another model than rank 0" in outcome.error
        assert "the random state of LazyInitContext" in outcome.error
    first, second = worlds(2).run(first_weight, SeededByRankAndLoaded)  # no random number is left in it
    assert torch.equal(first, second)


def test_they_start_as_the_first_one_if_the_user_wants_it(worlds):
    first, second = worlds(2).run(copied_from_the_first)
    torch.manual_seed(0)
    assert torch.equal(first, second) and torch.equal(first, nn.Linear(Training.width, Training.width).weight)


class WithFp64(Training):
    def build(self) -> nn.Module:
        return super().build().append(nn.Linear(8, 8).double())  # type: ignore[operator]


class SharedInReentrantCheckpoints(Training):
    use_reentrant = True

    def build(self) -> nn.Module:
        return Recomputed(self.width, self.use_reentrant)


class SharedInCheckpoints(SharedInReentrantCheckpoints):
    use_reentrant = False


class Recomputed(nn.Module):
    def __init__(self, width: int, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(width, width), nn.Linear(width, width)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return x

    def layer(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(x))


def train(kind: type[Training]) -> None:
    kind(Where.RANKS).train()


def test_what_cannot_be_summed_in_the_order_of_ranks_is_refused(worlds):
    for outcome in worlds(2).outcomes(boost, WithFp64):
        assert (
            outcome.error.startswith("ValueError: the gradient of the parameter 11.weight")
            and "float()" in outcome.error
        )
    for outcome in worlds(2).outcomes(train, SharedInReentrantCheckpoints):
        assert "RankError" in outcome.error and "use_reentrant=False" in outcome.error
    check_exact(worlds(2), SharedInCheckpoints)
