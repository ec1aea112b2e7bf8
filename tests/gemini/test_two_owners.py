"""A model whose chunks are kept by two owners, half each, trains with the bits of one owner."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL, WIDTH, batch
from other_optimizers import OPTIMIZERS
from other_optimizers import build as build_large
from safetensors.torch import load_file
from torch import Tensor, nn
from two_owners import Owners, check_owners

from gemini.chunk import Tier
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(120)

PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "160KiB", **SMALL},
    "disk": {"host_memory": "1000KiB", "offload_dir": "disk", **SMALL},
}


def loss(model: nn.Module, number: int) -> Tensor:
    torch.manual_seed(number)  # for the dropout
    return model(batch(number)).float().square().mean()  # type: ignore[no-any-return]


def build() -> tuple[nn.Module, Any]:
    model = build_large()
    return model, HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def both(*arguments: Any, **plugin: Any) -> tuple[Owners, Owners]:
    return Owners(2, *arguments, **plugin), Owners(1, *arguments, **plugin)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_two_owners_train_as_one_that_accumulates_their_batches(place: str, precision: str) -> None:
    ours, alone = both(build, loss, precision=precision, **PLACES[place])
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)
    assert ours.shared.gathered_numel > 0
    assert not any(chunk.is_whole for chunk in ours.chunks)


def homes(owners: Owners) -> set[Tier]:
    return {home.tier for chunk in owners.chunks for home in chunk.homes.values()}


@pytest.mark.parametrize("place", PLACES)
def test_the_homes_of_both_owners_are_on_the_tiers_asked_for(place: str) -> None:
    ours = Owners(2, build, loss, **PLACES[place])
    assert (Tier.DISK in homes(ours)) == (place == "disk")


@pytest.mark.parametrize(
    ("place", "precision", "count"), [("resident", "fp32", 2), ("resident", "bf16", 5), ("disk", "fp32", 3)]
)
def test_gradients_of_several_rounds_are_summed_in_the_order_of_rounds_and_owners(
    place: str, precision: str, count: int
) -> None:
    arguments: dict[str, Any] = {"precision": precision, **PLACES[place]}
    ours, alone = Owners(count, build, loss, **arguments), Owners(1, build, loss, **arguments)
    assert ours.train(3, micro_batches=2 * count) == alone.train(3, micro_batches=2 * count)
    check_owners(ours, alone)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_clipped_by_the_norm_of_the_sums(place: str, precision: str) -> None:
    ours, alone = both(build, loss, precision=precision, max_norm=0.05, initial_scale=1024, **PLACES[place])
    assert ours.train(3) == alone.train(3)
    check_owners(ours, alone)
    for norm in (2.0, float("inf")):
        for owners in (ours, alone):
            owners.backward(7, 8)
        (expected,) = [opt.clip_grad_by_norm(0.01, norm) for opt in alone.optimizers]
        assert [opt.clip_grad_by_norm(0.01, norm) for opt in ours.optimizers] == [expected] * 2
        for owners in (ours, alone):
            owners.each(lambda model, optimizer: optimizer.clip_grad_by_value(1e-3))
            owners.step()
        check_owners(ours, alone)


def test_a_step_that_overflows_is_skipped_by_both_owners() -> None:
    ours, alone = both(build, loss, precision="fp16", initial_scale=2.0**32)
    assert ours.train(2) == alone.train(2)
    check_owners(ours, alone)
    assert [optimizer._managed.scaling.skipped_steps for optimizer in ours.optimizers] == [2, 2]


@pytest.mark.parametrize("place", PLACES)
def test_a_split_master_has_the_same_bits_as_halves_of_whole_ones(place: str) -> None:
    ours, alone = both(build, loss, precision="bf16", split_master=True, **PLACES[place])
    assert any(chunk.is_split for chunk in alone.chunks) and not any(chunk.is_split for chunk in ours.chunks)
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("place", PLACES)
def test_states_that_a_block_of_elements_shares_are_cut_between_blocks(place: str, states: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        model = build_large()
        return model, HybridAdam(model.parameters(), lr=1e-2, states=states)

    ours, alone = both(make, loss, **PLACES[place])
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "kind", ["SGD", "SGD of Nesterov", "Adagrad", "RMSprop with all", "Adam amsgrad", "Rprop", "NAdam decoupled"]
)
@pytest.mark.parametrize("place", ["streamed"])
def test_other_optimizers_have_their_bits(place: str, kind: str) -> None:
    cls, options = OPTIMIZERS[kind]

    def make() -> tuple[nn.Module, Any]:
        model = build_large()
        return model, cls(model.parameters(), **options)

    ours, alone = both(make, loss, precision="fp32", **PLACES[place])
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["resident", "streamed"])
def test_layers_are_unfrozen_in_the_middle_of_training(place: str, precision: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        model = build_large()
        for parameter in model[:2].parameters():  # type: ignore[index]
            parameter.requires_grad_(False)
        return model, HybridAdam((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    def unfreeze(model: Any, optimizer: Any) -> None:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": frozen, "lr": 3e-3})

    ours, alone = both(make, loss, precision=precision, **PLACES[place])
    assert ours.train(2) == alone.train(2)
    for owners in (ours, alone):
        owners.each(unfreeze)
    assert ours.train(3) == alone.train(3)
    check_owners(ours, alone)


@pytest.mark.parametrize("place", PLACES)
def test_layers_are_frozen_for_a_while(place: str) -> None:
    ours, alone = both(build, loss, **PLACES[place])
    for requires_grad in (True, False, True):
        for owners in (ours, alone):
            for model in owners.models:
                model[:2].requires_grad_(requires_grad)
        assert ours.train(2) == alone.train(2)
    check_owners(ours, alone)


def test_a_parameter_takes_a_step_if_any_owner_has_a_gradient_of_it() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor, chosen: int) -> Tensor:
            return self.experts[chosen](x)  # type: ignore[no-any-return]

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = Experts()
        return model, HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)

    def of_expert(model: nn.Module, number: int) -> Tensor:
        return model(batch(number), number % 3).float().square().mean()  # type: ignore[no-any-return]

    ours, alone = both(make, of_expert, precision="bf16")
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_saved_and_loaded_is_the_whole_model(place: str, tmp_path: Path) -> None:
    ours, alone = both(build, loss, **PLACES[place])
    for owners in (ours, alone):
        owners.train(2)
    (model,), (optimizer,) = alone.models, alone.optimizers
    alone.boosters[0].save_model(model, tmp_path / "alone")
    alone.boosters[0].save_optimizer(optimizer, tmp_path / "alone")
    for i, booster in enumerate(ours.boosters):
        booster.save_model(ours.models[i], tmp_path / "ours")  # which the first one does for all
        booster.save_optimizer(ours.optimizers[i], tmp_path / "ours")
    for file in (tmp_path / "alone").glob("*.safetensors"):
        found, expected = load_file(tmp_path / "ours" / file.name), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for owners in (ours, alone):
        owners.train(2)
        for i, booster in enumerate(owners.boosters):
            booster.load_model(owners.models[i], tmp_path / "alone")
            booster.load_optimizer(owners.optimizers[i], tmp_path / "alone")
    assert ours.train(2) == alone.train(2)
    check_owners(ours, alone)


@pytest.mark.parametrize("place", PLACES)
def test_what_users_change_goes_home_to_each_owner(place: str) -> None:
    def change(model: Any, optimizer: Any) -> None:
        with torch.no_grad():
            model[0].weight.clamp_(-0.05, 0.05)
            model[3].weight.data[:9] = 0.25
        model[-1].bias.data = torch.full((7,), 0.125, dtype=model[-1].bias.dtype)
        state = optimizer.state[model[0].weight]
        state["exp_avg"].mul_(0.5)

    def build_linear() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(5)], nn.Linear(WIDTH, 7))
        return model, HybridAdam(model.parameters(), lr=1e-2)

    ours, alone = both(build_linear, loss, precision="bf16", **PLACES[place])
    for owners in (ours, alone):
        owners.train(2)
        owners.each(change)
    check_owners(ours, alone)
    assert ours.train(2) == alone.train(2)
    check_owners(ours, alone)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_asked_for_is_the_sum_of_all_owners(precision: str) -> None:
    def double(model: Any, optimizer: Any) -> None:
        model[0].weight.grad.mul_(2)

    ours, alone = both(build, loss, precision=precision)
    for owners in (ours, alone):
        owners.backward(0, 1)
    assert torch.equal(ours.models[1][-1].bias.grad, alone.models[0][-1].bias.grad)
    for owners in (ours, alone):
        owners.each(double)
        owners.step()
        owners.train(1)
    check_owners(ours, alone)


def test_zeroed_gradients_stay_gradients() -> None:
    ours, alone = both(build, loss, precision="fp32")
    for owners in (ours, alone):
        owners.train(1)
        owners.backward(0, 1)
        owners.each(lambda model, optimizer: optimizer.zero_grad(set_to_none=False))
        owners.step()
        owners.train(2)
    check_owners(ours, alone)


def test_updates_within_backward_are_refused() -> None:
    with pytest.raises(ValueError, match="update_in_backward=True is for one process, this is one of several"):
        Owners(2, build, loss, update_in_backward=True)
