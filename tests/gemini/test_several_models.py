"""Several models in one loop, and other uses of a model between its backward and its step."""

import gc
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, WIDTH, batch, build
from parity import check_at_rest, masters
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.boosting.alive import managers
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam

Placement = dict[str, Any] | None


class Player:
    """A model of the loop: managed where there is a placement, with an optimizer unless it only looks on."""

    def __init__(self, model: nn.Module, placement: Placement, trains: bool = True) -> None:
        self.is_managed = placement is not None
        self.model: Any = model
        self.optimizer: Any = HybridAdam(model.parameters(), lr=1e-2) if trains else None
        if placement is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **placement))
            self.model, *others = self.booster.boost(*((model, self.optimizer) if trains else (model,)))
            self.optimizer = others[0] if trains else None

    def backward(self, loss: Tensor) -> None:
        if self.is_managed:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        if self.is_managed:
            check_at_rest(self.model)
            return masters(self.model)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def check_equal(run: Any, placement: dict[str, Any]) -> None:
    """``run(placement)`` gives tensors and numbers; without management they are the same."""
    outcomes = []
    for where in (placement, None):
        torch.manual_seed(3)
        outcomes.append(run(where))
    ours, plain = outcomes
    assert ours.keys() == plain.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, plain[name])]


@pytest.fixture(params=PLACEMENTS)
def placement(request: Any, tmp_path: Any, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = PLACEMENTS[request.param]
    return found


def test_a_student_learns_from_a_boosted_teacher(placement: dict[str, Any]) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        teacher, student = Player(build(), where, trains=False), Player(build(), where)
        with torch.no_grad():
            student.model[0].bias.add_(0.5)
        for number in range(3):
            with torch.no_grad():
                target = teacher.model(batch(number))
            student.backward((student.model(batch(number)) - target).square().mean())
            student.update()
        return student.weights()

    check_equal(run, placement)


def test_two_models_train_against_each_other(placement: dict[str, Any]) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        torch.manual_seed(0)
        maker = Player(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)), where)
        judge = Player(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)), where)
        for number in range(3):
            made = maker.model(batch(number))
            judge.backward(judge.model(made.detach()).mean() - judge.model(batch(number + 100)).mean())
            judge.update()
            maker.backward(-judge.model(made).mean())  # leaves gradients in the judge too, as in plain PyTorch
            maker.update()
            judge.optimizer.zero_grad()
        return {f"{who}.{k}": v for who, player in (("m", maker), ("j", judge)) for k, v in player.weights().items()}

    check_equal(run, placement)


def test_an_average_of_the_weights_is_kept_in_another_boosted_model(placement: dict[str, Any]) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        student, average = Player(build(), where), Player(build(), where, trains=False)
        for number in range(3):
            student.backward(student.model(batch(number)).square().mean())
            student.update()
            before = dict(gemini.named_tensors(average.model))
            mixed = {name: before[name].lerp(value, 0.1) for name, value in gemini.named_tensors(student.model)}
            average.model.load_state_dict(mixed)
            average.model.eval()
            with torch.no_grad():
                seen = average.model(batch(50))
        return {**average.weights(), "output": seen}

    check_equal(run, placement)


def test_evaluating_between_backward_and_step_changes_nothing(placement: dict[str, Any]) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        player = Player(build(), where)
        found: dict[str, Tensor] = {}
        for number in range(4):
            player.backward(player.model(batch(number)).square().mean())
            player.model.eval()
            with torch.no_grad():
                for turn in range(3):
                    found[f"seen {number} {turn}"] = player.model(batch(turn, rows=1 + turn)).clone()
            player.model.train()
            player.update()
        return {**player.weights(), **found}

    check_equal(run, placement)


def test_generating_between_backward_and_step_where_everything_streams() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=96, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )

    def run(where: Placement) -> dict[str, Tensor]:
        torch.manual_seed(0)
        player = Player(transformers.GPT2LMHeadModel(config), where)
        found: dict[str, Tensor] = {}
        for number in range(3):
            tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(number))
            player.backward(player.model(tokens, labels=tokens).loss)
            player.model.eval()
            found[str(number)] = player.model.generate(
                tokens[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            player.model.train()
            player.update()
        return {**player.weights(), **found}

    check_equal(run, {"device_memory": "40KiB", **SMALL})


@pytest.mark.parametrize("part", [0, 6, 16])
def test_running_out_of_memory_while_evaluating_leaves_training_as_it_was(part: int) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        player = Player(build(), where)
        for number in range(4):
            player.backward(player.model(batch(number)).square().mean())
            if number % 2:
                handle = player.model[part].register_forward_hook(_no_memory)
                player.model.eval()
                with torch.no_grad(), pytest.raises(OutOfMemory if where is not None else torch.OutOfMemoryError):
                    player.model(batch(9))
                handle.remove()
                player.model.train()
            player.update()
        if where is not None:
            assert not any(chunk.pins for chunk in boosted(player.model).manager.chunks)
        return player.weights()

    check_equal(run, {"device_memory": "36KiB", **SMALL})


def _no_memory(module: nn.Module, args: Any, output: Any) -> None:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 20.00 GiB")


def test_a_model_that_is_gone_lays_no_claim_to_parameters() -> None:
    model = Booster(plugin=GeminiPlugin(telemetry=False)).boost(nn.Linear(2, 2))[0]
    manager = boosted(model).manager  # somebody holds it: a traceback, say
    assert manager in managers()
    del model
    gc.collect()
    assert manager not in managers()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_models_may_share_modules_without_parameters(placement: str) -> None:
    def run(where: Placement) -> dict[str, Tensor]:
        act = nn.GELU()
        players = [Player(nn.Sequential(nn.Linear(WIDTH, WIDTH), act, nn.Linear(WIDTH, 8)), where) for _ in range(2)]
        for step in range(2):
            for player in players:
                player.backward(player.model(batch(step)).square().mean())
                player.update()
        return {f"{i}.{name}": value for i, player in enumerate(players) for name, value in player.weights().items()}

    check_equal(run, PLACEMENTS[placement])
