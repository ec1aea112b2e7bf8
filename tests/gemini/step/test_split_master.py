"""``split_master=True``: the numbers of whole masters, in 2 bytes a parameter less, wherever the rest is."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limited import limited, outcome
from loop import PLACEMENTS, SMALL, Trained, check_same
from parity import Task, check_equal, check_parity, run_managed, run_plain
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, Chunk, MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.estimate.demand import ModelData, model_bytes
from gemini.estimate.subject import Subject
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels import reference, update
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules import adam_rule


class Odd(nn.Module):
    """Odd lengths, a convolution in channels_last, a parameter that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last), nn.Identity()
        self.first, self.second = nn.Linear(7, 1031), nn.Linear(1031, 97, bias=False)
        self.rare, self.last = nn.Linear(97, 97), nn.Linear(97, 5)
        make_ties(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(self.norm(self.conv(x)).flatten(2).mean(2)).tanh())
        return self.last(h + self.rare(h) if float(x.flatten()[0]) > 0 else h)


class WithStatistics(Odd):
    """Has parameters that stay fp32, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(7)


@torch.no_grad()
def make_ties(model: nn.Module) -> None:
    """Half of the weights are half way between two bfloat16, as long as nothing rounds them."""
    for parameter in model.parameters():
        bits = (parameter.view(torch.int32) & ~0xFFFF) | 0x8000
        parameter.copy_(torch.where(torch.rand(parameter.shape) < 0.5, bits.view(torch.float32), parameter))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def task(lr: float = 1e-2, build: type[nn.Module] = Odd, steps: int = 6) -> Task:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(steps)]
    return Task(build, batches, loss, "bf16", lr=lr)


def size(numel: int) -> dict[str, Any]:
    return {"chunk_config_dict": {1: {"chunk_size": numel}}}


PLACES: dict[str, dict[str, Any]] = {
    "everything resident": {},
    "small chunks": size(1 << 12),
    "an emulated device": {"device_memory": "64MiB"},
    "half on an emulated device": {"device_memory": "1MiB", **size(1 << 13)},
    "states on disk": {"host_memory": "1500KiB", "offload_dir": None, **size(1 << 14)},
    "masters on disk, too": {"host_memory": "480KiB", "offload_dir": None, **size(1 << 12)},
}


def arguments(place: str, folder: Path) -> dict[str, Any]:
    found = dict(PLACES[place])
    return {**found, "offload_dir": folder} if "offload_dir" in found else found


def chunks_of(model: nn.Module) -> tuple[Chunk, ...]:
    return boosted(model).manager.chunks


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", PLACES)
def test_every_placement_gives_the_numbers_of_the_unmanaged_model(place: str, tmp_path: Path) -> None:
    model = check_parity(task(), split_master=True, **arguments(place, tmp_path))
    chunks = chunks_of(model)
    split = [chunk for chunk in chunks if chunk.is_split]
    bf16 = [chunk for chunk in chunks if chunk.full.dtype is torch.bfloat16]
    assert split
    assert (len(split) < len(bf16)) == (place in ("half on an emulated device", "masters on disk, too"))
    for chunk in bf16:
        homes = {name: home.tier for name, home in chunk.homes.items()}
        assert chunk.is_split == (
            homes[MASTER] is Tier.DEVICE or ("device_memory" not in PLACES[place] and homes[MASTER] is Tier.HOST)
        )
        assert not chunk.is_split or chunk.full_nbytes == 0
    on_disk = {name for chunk in split for name, home in chunk.homes.items() if home.tier is Tier.DISK}
    assert ("exp_avg_sq" in on_disk) == ("disk" in place)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lr", [1e-2, 1e-9])
def test_masters_that_are_ties_are_those_of_whole_masters(place: str, lr: float, tmp_path: Path) -> None:
    """Lazy models keep what bf16 would round; with so small a learning rate most ties stay ties for all steps."""
    train = task(lr, WithStatistics)
    whole, _ = run_managed(train, lazy=True, **arguments(place, tmp_path))
    ours, model = run_managed(train, lazy=True, split_master=True, **arguments(place, tmp_path))
    check_equal(ours, whole)
    marks = 0
    for chunk in chunks_of(model):
        if chunk.is_split and (signs := chunk.homes["exp_avg_sq"]).tensor is not None:
            marks += int(signs.tensor.signbit().sum())
    assert marks > 1000 or lr > 1e-9 or "disk" in place


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options", [{"update_in_backward": True}, {"max_norm": 0.05}, {"disk_checksums": True}], ids=str
)
@pytest.mark.parametrize("place", PLACEMENTS)
def test_other_ways_to_step_give_the_numbers_of_whole_masters(place: str, options: Any, tmp_path: Path) -> None:
    where = {**PLACEMENTS[place], **({"offload_dir": tmp_path} if place == "disk" else {})}
    whole, ours = Trained(where, "bf16", **options), Trained(where, "bf16", split_master=True, **options)
    torch.manual_seed(7)
    expected = [whole.step(step) for step in range(5)]
    torch.manual_seed(7)
    assert [ours.step(step) for step in range(5)] == expected
    check_same(ours, whole)


def test_gradients_of_several_backwards_add_up_as_with_whole_masters() -> None:
    whole, ours = Trained(SMALL, "bf16"), Trained(SMALL, "bf16", split_master=True)
    for run in (whole, ours):
        torch.manual_seed(7)
        for step in range(4):
            for micro in range(3):
                run.backward(run.loss(3 * step + micro))
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, whole)


def test_without_a_compiler_updates_in_slices_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_plain(task())
    monkeypatch.setattr(update, "KERNELS", {("cpu", form): kernel for form, kernel in reference.BY_FORM.items()})
    monkeypatch.setattr(update, "SLICE_NUMEL", 512)
    check_equal(run_managed(task(), split_master=True, **size(1 << 14))[0], expected)


def test_memory_that_runs_out_in_an_update_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ours = Trained(SMALL, "bf16"), Trained(SMALL, "bf16", split_master=True)
    torch.manual_seed(7)
    expected = [whole.step(step) for step in range(3)]
    boosted(whole.model).manager.settle()  # its last updates are not to fail
    calls = iter(range(1 << 30))

    def failing(*args: Any) -> None:
        if next(calls) in (0, 2, 5):
            raise MemoryError("no memory")
        adam_update(*args)

    monkeypatch.setattr(adam_rule, "adam_update", failing)
    torch.manual_seed(7)
    losses = []
    for step in range(3):
        losses.append(ours.step(step))
        while True:
            try:
                boosted(ours.model).manager.settle()
                break
            except OutOfMemory as error:
                assert "in the optimizer's update of " in str(error)
    assert losses == expected and next(calls) > 6
    check_same(ours, whole)


# -- checkpoints


@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_of_split_and_whole_masters_load_in_each_other(first: bool, tmp_path: Path) -> None:
    ways = [Trained(SMALL, "bf16", split_master=split) for split in (first, not first)]
    torch.manual_seed(7)
    for step in range(3):
        ways[0].step(step)
    ways[0].booster.save_model(ways[0].model, tmp_path / "model")
    ways[0].booster.save_optimizer(ways[0].optimizer, tmp_path / "optimizer")
    ways[1].booster.load_model(ways[1].model, tmp_path / "model")
    ways[1].booster.load_optimizer(ways[1].optimizer, tmp_path / "optimizer")
    in_memory = Trained(SMALL, "bf16", split_master=True)
    in_memory.model.load_state_dict(copy.deepcopy(ways[0].model.state_dict()))
    in_memory.optimizer.load_state_dict(copy.deepcopy(ways[0].optimizer.state_dict()))
    losses = []
    for run in (*ways, in_memory):
        torch.manual_seed(8)
        losses.append([run.step(step) for step in range(3, 6)])
    assert losses[1] == losses[0] == losses[2]
    for run in (ways[1], in_memory):
        check_same(run, ways[0])
        a, b = run.optimizer.state_dict()["state"], ways[0].optimizer.state_dict()["state"]
        assert all(torch.equal(a[i][name], b[i][name]) for i in b for name in ("exp_avg", "exp_avg_sq"))
        assert all(not bool(state["exp_avg_sq"].signbit().any()) for state in a.values())


# -- what it takes


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))


def test_statistics_placement_and_estimate_say_14_bytes_a_parameter() -> None:
    numel = 2 * 512 * 512
    one = Task(two_layers, [torch.randn(2, 512)] * 3, loss, "bf16")
    _, model = run_managed(one, split_master=True)
    stats = model.memory_stats()  # type: ignore[operator]
    assert stats["model_data/parameter_bytes"] == 4 * numel and stats["model_data/optimizer_bytes"] == 8 * numel
    manager = boosted(model).manager
    assert manager.ledger.peak(Tier.HOST) == 14 * numel and manager.moves.fetch_count == 0
    data = ModelData(Subject("two layers", two_layers, lambda size, length: {}), GeminiConfig(split_master=True))
    limits = {Tier.DEVICE: 1, Tier.HOST: 14 * numel, Tier.DISK: 0}
    packing = data.pack(limits, MemoryMap.UNIFIED)
    assert packing.placement.nbytes == boosted(model).packing.placement.nbytes
    assert model_bytes(packing, limits)[Tier.HOST] == 14 * numel
    run_managed(one, split_master=True, host_memory=14 * numel)
    with pytest.raises(OutOfMemory):
        run_managed(one, host_memory=14 * numel)


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_14_bytes_a_parameter_are_enough_for_all_to_stay_under_a_system_limit() -> None:
    whole = {"precision": "bf16", "split_master": False}
    split = {**whole, "split_master": True}
    ours, roomy = outcome(limited(14.0, 48, **split)), outcome(limited(18.0, 48, **whole))
    assert ours == roomy and ours["evictions"] == 0
    # Whole masters and their copies take 16: something has to give way, or there is none left.
    short = limited(14.0, 48, **whole)
    assert short.returncode != 0 or outcome(short)["evictions"] > 0


# -- edits


def clamped(run: Trained) -> object:
    with torch.no_grad():
        return run.model[0].weight.clamp_(-0.05, 0.05) is None


def halved_through_data(run: Trained) -> object:
    run.model[3].weight.data.mul_(0.5)
    run.model[3].bias.data[:8] = 0
    return None


def scaled_by_foreach(run: Trained) -> object:
    with torch.no_grad():
        torch._foreach_mul_(list(run.model.parameters()), 0.75)
    return None


def held_and_written_after_a_step(run: Trained) -> object:
    held = run.model[0].weight.data
    run.step(5)
    held.add_(0.125)
    return held  # until the next step is over


def assigned(run: Trained) -> object:
    run.model[0].weight.data = run.model[0].weight.data.clamp(-0.05, 0.05)
    return None


def loaded_into_held_memory(run: Trained) -> object:
    held = [parameter.data for parameter in run.model.parameters()]
    run.model.load_state_dict({name: value * 0.7 for name, value in run.model.state_dict().items()})
    return held


def assigned_to_held_memory(run: Trained) -> object:
    held = [parameter.detach() for parameter in run.model.parameters()]
    for parameter in run.model.parameters():
        parameter.data = torch.full(parameter.shape, 0.0123)  # fp32, as masters are
    return held


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "edit",
    [
        clamped,
        halved_through_data,
        scaled_by_foreach,
        held_and_written_after_a_step,
        assigned,
        loaded_into_held_memory,
        assigned_to_held_memory,
    ],
)
def test_changes_in_place_are_what_they_are_with_whole_masters(edit: Callable[[Trained], object]) -> None:
    whole, ours = Trained(SMALL, "bf16"), Trained(SMALL, "bf16", split_master=True)
    for run in (whole, ours):
        torch.manual_seed(7)
        run.step(0)
        held = edit(run)
        run.step(1)
        del held
        run.step(2)
    check_same(ours, whole)


# -- what cannot be


def test_a_change_in_place_in_forward_is_refused_until_it_is_assigned() -> None:
    ours = Trained(SMALL, "bf16", split_master=True)
    ours.step(0)

    def clamp(module: nn.Linear, args: object) -> None:
        with torch.no_grad():
            module.weight.clamp_(-0.05, 0.05)

    hook = ours.model[0].register_forward_pre_hook(clamp)
    ours.backward(ours.loss(1))
    hook.remove()
    for attempt in (ours.optimizer.step, ours.model.state_dict, ours.optimizer.step):
        with pytest.raises(
            ValueError, match=r"^0\.weight was changed in place, which with split_master=True .* assign"
        ):
            attempt()
    ours.model[0].weight.data = ours.model[0].weight.data.clone()
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    ours.step(2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def bf16_states(model: nn.Module) -> torch.optim.Optimizer:
    return HybridAdam(model.parameters(), states="bf16")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sgd, "split_master=True needs HybridAdam with states='fp32'.*SGD here keeps momentum_buffer in torch.float32"),
        (
            bf16_states,
            "split_master=True needs HybridAdam with states='fp32'.*Adam here keeps exp_avg in torch.bfloat16",
        ),
    ],
)
def test_optimizers_without_a_bit_to_spare_are_refused(
    make: Callable[[nn.Module], torch.optim.Optimizer], message: str
) -> None:
    model = two_layers()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        Booster(plugin=GeminiPlugin(split_master=True, telemetry=False)).boost(model, make(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_modules_that_renormalise_their_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"cannot go with max_norm in 0: it changes weights in place"):
        Booster(plugin=GeminiPlugin(split_master=True, telemetry=False)).boost(model, HybridAdam(model.parameters()))
    model[0].weight.requires_grad_(False)
    Booster(plugin=GeminiPlugin(split_master=True, telemetry=False)).boost(model, HybridAdam(model[1].parameters()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_have_no_upper_half(precision: str) -> None:
    with pytest.raises(ValueError, match=f"split_master=True needs precision='bf16', .*it is '{precision}'"):
        GeminiPlugin(precision=precision, split_master=True)
