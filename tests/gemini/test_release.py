"""A model whose memory is given back between two phases of training, and taken again."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loop import PLACEMENTS, Trained, batch, check_same
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.errors import OutOfMemory, StateError
from gemini.nn.optimizer import HybridAdam

MIB = 1 << 20


def trained(placement: str, precision: str = "fp32", **plugin: Any) -> Trained:
    ours = Trained(PLACEMENTS[placement], precision, **plugin)
    for step in range(2):
        ours.step(step)
    return ours


def homes(model: nn.Module) -> set[Tier]:
    return {home.tier for chunk in boosted(model).manager.chunks for home in chunk.homes.values()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("precision", "in_backward", "options"),
    [
        ("fp32", False, {}),
        ("fp32", True, {}),
        ("bf16", False, {}),
        ("bf16", True, {}),
        ("fp16", False, {}),
        ("bf16", False, {"split_master": True}),
    ],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_goes_on_bit_for_bit_after_a_release(
    placement: str,
    precision: str,
    in_backward: bool,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = trained(placement, precision, update_in_backward=in_backward, **options)
    other = trained(placement, precision, update_in_backward=in_backward, **options)
    before = homes(ours.model)
    rng = torch.get_rng_state()
    for _ in range(2):
        ours.booster.release(ours.model, tmp_path / "parked")
        assert homes(ours.model) == {Tier.DISK}
        ours.booster.resume(ours.model)
        assert homes(ours.model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    losses = []
    for each in (ours, other):
        torch.manual_seed(3)
        losses.append([each.step(step) for step in range(2, 5)])
    assert losses[0] == losses[1]
    ours_states, theirs = ours.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    for index, state in theirs.items():
        assert all(torch.equal(ours_states[index][key], value) for key, value in state.items())
    if precision == "fp32" and not options:
        plain = Trained(None)
        for step in range(2):
            plain.step(step)
        torch.manual_seed(3)
        for step in range(2, 5):
            plain.step(step)
        check_same(ours, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_released_model_is_read_saved_and_loaded_and_computes_nothing(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, other = trained(placement), trained(placement)
    booster = ours.booster
    booster.release(ours.model, tmp_path)
    booster.release(ours.model)  # it is released already
    for use in (lambda: ours.model(batch(0)), ours.optimizer.step, lambda: ours.model[0].weight.sum()):
        with pytest.raises(StateError, match=r"call booster\.resume\(model\) first"):
            use()
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in ours.model.state_dict().items())
    booster.save_model(ours.model, str(tmp_path / "saved"))
    booster.save_optimizer(ours.optimizer, str(tmp_path / "saved"))
    fresh = Trained(PLACEMENTS[placement])
    fresh.booster.release(fresh.model, tmp_path)
    fresh.booster.load_model(fresh.model, str(tmp_path / "saved"))
    fresh.booster.load_optimizer(fresh.optimizer, str(tmp_path / "saved"))
    for each in (ours, fresh):
        each.booster.resume(each.model)
        each.booster.resume(each.model)  # it has memory already
    losses = []
    for each in (ours, other, fresh):
        torch.manual_seed(3)
        losses.append([each.step(step) for step in range(2, 4)])
    assert losses[0] == losses[1] == losses[2]


def test_gradients_memory_held_outside_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    ours, other = trained("resident"), trained("resident")
    with pytest.raises(ValueError, match=r"needs a folder for the values: booster\.release\(model, folder="):
        ours.booster.release(ours.model)
    torch.manual_seed(3)
    loss = ours.loss(2)
    ours.backward(loss)
    with pytest.raises(ValueError, match=r"have gradients .* which would be lost"):
        ours.booster.release(ours.model, tmp_path)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    held = ours.model[0].weight.data
    with pytest.raises(ValueError, match=r"memory of 0\.weight is held outside of the model"):
        ours.booster.release(ours.model, tmp_path)
    del held
    ours.booster.release(ours.model, tmp_path)
    ours.booster.resume(ours.model)
    torch.manual_seed(3)
    other.step(2)
    torch.manual_seed(4)
    ours_loss = ours.step(3)
    torch.manual_seed(4)
    assert ours_loss == other.step(3)


def test_a_model_that_finds_no_room_stays_released_until_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = trained("streamed"), trained("streamed")
    ours.booster.release(ours.model, tmp_path)
    ledger = boosted(ours.model).manager.ledger
    room = ledger.capacity(Tier.HOST)
    ledger.resize(Tier.HOST, 0)
    with pytest.raises(OutOfMemory):
        ours.booster.resume(ours.model)
    with pytest.raises(StateError, match=r"call booster\.resume"):
        ours.model(batch(0))
    ledger.resize(Tier.HOST, room)
    ours.booster.resume(ours.model)
    losses = []
    for each in (ours, other):
        torch.manual_seed(3)
        losses.append(each.step(2))
    assert losses[0] == losses[1]


def test_the_resident_set_shrinks_by_what_the_model_had(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(12)])
    optimizer = HybridAdam(model.parameters())
    booster = Booster(plugin=GeminiPlugin(precision="bf16", telemetry=False, offload_dir=str(tmp_path)))
    model, optimizer, *_ = booster.boost(model, optimizer)
    booster.backward(model(torch.ones(1, 1024)).square().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    boosted(model).manager.settle()
    process = psutil.Process()
    before = process.memory_info().rss
    used = model.memory_stats()["host/used_bytes"]
    assert used > 12 * 12 * MIB
    booster.release(model)
    assert model.memory_stats()["host/used_bytes"] + model.memory_stats()["device/used_bytes"] < used / 20
    assert before - process.memory_info().rss > 0.9 * 12 * 12 * MIB
    booster.resume(model)
    assert model.memory_stats()["host/used_bytes"] > 12 * 12 * MIB
