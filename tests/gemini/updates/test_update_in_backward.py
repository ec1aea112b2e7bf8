"""``update_in_backward=True`` gives the numbers of the normal step."""

from typing import Any

import pytest
import torch
from backward_runs import BY_PRECISION, STEPS, Run, everywhere, in_backward, trainable, updates_of
from loop import PLACEMENTS, SMALL, WIDTH, Trained, batch, check_same
from parity import Task, check_at_rest, check_equal, masters, run_managed, run_plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(60)


@pytest.mark.one_in(3)
@everywhere
@pytest.mark.parametrize("precision", BY_PRECISION)
def test_it_trains_as_the_normal_step_does(backward_placement: dict[str, Any], precision: str) -> None:
    ours = Trained(backward_placement, precision, update_in_backward=True)
    losses = [ours.step(step) for step in range(STEPS)]
    normal = Trained({}, precision)
    assert losses == [normal.step(step) for step in range(STEPS)]
    assert updates_of(ours.model).update_count == STEPS * trainable(ours.model)  # all of them within backward
    check_at_rest(ours.model)
    theirs = normal.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]
    for mine, other in zip(states(ours), states(normal), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def states(run: Trained) -> list[dict[str, Tensor]]:
    return list(run.optimizer.state_dict()["state"].values())


class Odd(nn.Module):
    """Tied weights, a layer used three times, checkpoints, a part used by turns, one frozen, one without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.use_reentrant: bool | None = None
        self.calls = 0

    def body(self, x: Tensor, block: nn.Module) -> Tensor:
        return torch.tanh(self.shared(block(x))) * self.scale

    def forward(self, index: Tensor) -> Tensor:
        self.calls += 1
        x = self.table(index)
        x = self.frozen(torch.tanh(self.first(x)))
        for block in self.blocks:
            if self.use_reentrant is None:
                x = self.body(x, block)
            else:
                x = checkpoint(self.body, x, block, use_reentrant=self.use_reentrant)
        with torch.no_grad():
            target = self.teacher(x)
        if self.calls % 2 == 0:
            x = x + self.unused(x)
        loss = nn.functional.cross_entropy(self.head(x), (index + 1) % 32)
        return loss + (self.teacher(x) - target).square().mean() + (x - target).square().mean()


def odd(use_reentrant: bool | None, precision: str) -> Task:
    def prepare(model: Any) -> None:
        model.use_reentrant = use_reentrant

    batches = [torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
    return Task(Odd, batches, lambda model, index: model(index), precision, prepare=prepare)


ODD_PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "100KiB"},
    "disk": {"host_memory": "500KiB", "offload_dir": "disk"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", BY_PRECISION)
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("where", ODD_PLACEMENTS)
def test_odd_uses_of_parameters_train_as_in_plain_pytorch(
    where: str, use_reentrant: bool | None, precision: str, tmp_path: Any
) -> None:
    options = {**ODD_PLACEMENTS[where], **SMALL}
    if "offload_dir" in options:
        options["offload_dir"] = tmp_path
    task = odd(use_reentrant, precision)
    run, model = run_managed(task, update_in_backward=True, **options)
    check_equal(run, run_plain(task))
    # What waits for the step: the teacher's chunks, since a call without a graph might have been a checkpoint's, and in
    # half of the steps the unused layer's, which has nothing to be updated then.
    count = updates_of(model).update_count
    assert STEPS * (trainable(model) - 4) <= count < STEPS * trainable(model)


@everywhere
def test_the_options_are_those_of_this_step(backward_placement: dict[str, Any]) -> None:
    def train(run: Trained) -> list[float]:
        scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (step + 1))
        losses = []
        for step in range(STEPS):
            losses.append(run.step(step))
            scheduler.step()
        return losses

    ours, plain = in_backward(backward_placement), Run(None)
    assert train(ours) == train(plain)
    check_same(ours, plain)


def test_groups_have_their_own_options_and_chunks(backward_placement: dict[str, Any]) -> None:
    def run(managed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "lr": 0.1, "betas": (0.8, 0.9)}]
        optimizer: Any = HybridAdam(groups, lr=1e-2)
        if managed:
            plugin = GeminiPlugin(precision="fp32", telemetry=False, update_in_backward=True, **backward_placement)
            model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
        for step in range(STEPS):
            model(batch(step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if managed:
            assert updates_of(model).update_count == STEPS * trainable(model)
        return masters(model) if managed else {n: p.detach().clone() for n, p in model.named_parameters()}

    ours, plain = run(True), run(False)
    assert not [name for name in plain if not torch.equal(ours[name], plain[name])]


def test_a_parameter_outside_of_the_chunks_waits_for_the_step() -> None:
    def train(run: Trained) -> Tensor:
        double = nn.Parameter(torch.ones(8, dtype=torch.float64))
        run.optimizer.add_param_group({"params": [double]})
        for step in range(STEPS):
            run.backward(run.loss(step) + (double * step).sum())
            run.optimizer.step()
            run.optimizer.zero_grad()
        return double.detach()

    ours, plain = in_backward(PLACEMENTS["streamed"]), Run(None)
    assert torch.equal(train(ours), train(plain))
    check_same(ours, plain)


def test_two_forwards_before_one_backward_work(backward_placement: dict[str, Any]) -> None:
    def train(run: Trained) -> None:
        for step in range(STEPS):
            run.backward(run.loss(2 * step) + run.loss(2 * step + 1))
            run.optimizer.step()
            run.optimizer.zero_grad()

    ours, plain = in_backward(backward_placement), Run(None)
    train(ours), train(plain)
    check_same(ours, plain)


def test_a_closure_and_a_double_backward_work() -> None:
    def train(run: Trained) -> None:
        for step in range(STEPS):

            def closure(step: int = step) -> Tensor:
                run.optimizer.zero_grad()
                x = batch(step).requires_grad_()
                loss = run.model(x).square().mean()
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
                run.backward(loss)
                return loss

            run.optimizer.step(closure)

    ours, plain = in_backward(SMALL), Run(None)
    train(ours), train(plain)
    check_same(ours, plain)


def test_evaluation_between_steps_changes_nothing(backward_placement: dict[str, Any]) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    for step in range(STEPS):
        assert ours.step(step) == plain.step(step)
        outputs = []
        for run in (ours, plain):
            run.model.eval()
            with torch.no_grad():
                outputs.append(run.model(batch(step)))
            run.model.train()
        assert torch.equal(*outputs)
    check_same(ours, plain)
