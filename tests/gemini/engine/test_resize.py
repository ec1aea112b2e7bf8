"""Tiers whose capacity changes while a model is trained: homes move, numbers do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL, Trained, check_same
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.chunk import MemoryMap, Tier
from gemini.chunk.disk import DiskBuffer
from gemini.errors import OffloadError, OutOfMemory
from gemini.memory.foresight import Foresight, capacity_between_steps

KIB = 1 << 10
IN_RAM: dict[str, Any] = {"host_memory": "4MiB", "offload_dir": "disk", **SMALL}
APART: dict[str, Any] = {"device_memory": "100KiB", "host_memory": "4MiB", "offload_dir": "disk", **SMALL}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "initial_scale": 8.0},
    "split": {"precision": "bf16", "split_master": True},
    "in backward": {"precision": "bf16", "update_in_backward": True},
    "checksums": {"precision": "bf16", "disk_checksums": True},
}


class Eight(Trained):
    def make_optimizer(self, model: nn.Module) -> Any:
        return gemini.HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1, states="8bit")


class Momentum(Trained):
    def make_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


class HalfFrozen(Trained):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        for parameter in list(model.parameters())[:5]:
            parameter.requires_grad_(False)
        return model


def capacity(ours: Trained, tier: Tier = Tier.HOST) -> int:
    return boosted(ours.model).manager.ledger.capacity(tier)


def resize(ours: Trained, **tiers: int) -> None:
    boosted(ours.model).engine.resize({Tier(name): nbytes for name, nbytes in tiers.items()})


def bytes_on(ours: Trained, tier: Tier) -> int:
    chunks = boosted(ours.model).manager.chunks
    return sum(home.nbytes for chunk in chunks for home in chunk.homes.values() if home.tier is tier)


def least(ours: Trained, tier: str = "host") -> int:
    """The smallest capacity that is taken, as the messages say."""
    nbytes = 0
    for _ in range(9):
        try:
            boosted(ours.model).engine.resize({Tier(tier): nbytes})
        except OutOfMemory as error:
            nbytes = int(str(error).split(f"Give {tier} ")[1].split(" bytes")[0])
        else:
            return nbytes
    raise AssertionError("the messages did not lead to a capacity that does")


def step(each: Trained, number: int) -> float:
    torch.manual_seed(number)  # for the dropout
    return each.step(number)


def add_gradients(each: Trained, number: int) -> None:
    torch.manual_seed(number)
    each.backward(each.loss(number))


def states(ours: Trained) -> dict[Any, dict[str, Any]]:
    return ours.optimizer.state_dict()["state"]  # type: ignore[no-any-return]


def check_alike(ours: Trained, other: Trained) -> None:
    theirs, found = other.weights(), ours.weights()
    assert not [name for name, value in theirs.items() if not torch.equal(found[name], value)]
    for index, state in states(other).items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(states(ours)[index][name]), torch.as_tensor(value)), name


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", [IN_RAM, APART], ids=["one RAM", "a device of its own"])
def test_numbers_do_not_see_homes_go_down_and_come_up(placement: dict[str, Any], kind: str) -> None:
    ours, other = (Trained(placement, **KINDS[kind]) for _ in range(2))
    step(ours, 0), step(other, 0)
    most, on_disk = capacity(ours), bytes_on(ours, Tier.DISK)
    smallest, before = least(ours), bytes_on(ours, Tier.HOST)
    resize(ours, host=most)
    assert bytes_on(ours, Tier.DISK) == on_disk == 0
    losses = []
    for number, nbytes in enumerate([(most + smallest) // 2, smallest, (most + 3 * smallest) // 4, most], 1):
        resize(ours, host=nbytes)
        assert capacity(ours) == nbytes
        losses.append((step(ours, number), step(other, number)))
        assert boosted(ours.model).manager.ledger.used(Tier.HOST) <= nbytes
    assert all(mine == theirs for mine, theirs in losses)
    assert bytes_on(ours, Tier.DISK) == 0
    assert before <= bytes_on(ours, Tier.HOST)
    check_alike(ours, other)


@pytest.mark.parametrize("cls", [Eight, Momentum, HalfFrozen])
def test_other_optimizers_and_frozen_parts_move_alike(cls: Callable[..., Trained]) -> None:
    ours, other = (cls(IN_RAM, precision="bf16") for _ in range(2))
    for number in range(4):
        resize(ours, host=4096 * KIB) if number % 2 else least(ours)
        assert (bytes_on(ours, Tier.DISK) > 0) is not bool(number % 2)
        assert step(ours, number) == step(other, number)
    check_alike(ours, other)


def test_homes_of_a_device_go_to_ram_and_come_back() -> None:
    ours, other, plain = Trained(APART), Trained(APART), Trained(None)
    most = capacity(ours, Tier.DEVICE)
    for number in range(4):
        before = bytes_on(ours, Tier.DEVICE)
        resize(ours, device=most) if number % 2 else least(ours, "device")
        assert (bytes_on(ours, Tier.DEVICE) > before) is bool(number % 2)
        assert step(ours, number) == step(other, number) == step(plain, number)
    check_alike(ours, other)
    check_same(ours, plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_go_along_in_the_middle_of_accumulation(precision: str) -> None:
    ours, other = (Trained(IN_RAM, precision) for _ in range(2))
    most = capacity(ours)
    for number in range(3):
        for micro in range(3):
            for each in (ours, other):
                add_gradients(each, 3 * number + micro)
            resize(ours, host=most) if micro == 1 else least(ours)
            if micro == 1 and number == 1:
                gradients = [[p.grad for p in each.model.parameters()] for each in (ours, other)]
                assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        for each in (ours, other):
            torch.nn.utils.clip_grad_norm_(each.model.parameters(), 0.5) if precision == "fp32" else None
            each.optimizer.step()
            if number != 1:
                each.optimizer.zero_grad()  # else they add up, as in plain PyTorch
    check_alike(ours, other)


def test_a_gradient_that_somebody_holds_stays_what_it_is() -> None:
    ours, plain = Trained(IN_RAM), Trained(None)
    for each in (ours, plain):
        add_gradients(each, 0)
    held = [[p.grad for p in each.model.parameters()] for each in (ours, plain)]
    least(ours)
    with torch.no_grad():
        for each in held:
            for gradient in each:
                gradient.mul_(0.5)
    for each in (ours, plain):
        each.optimizer.step()
    check_same(ours, plain)


@pytest.mark.parametrize("then", ["backward", "zero_grad", "read"])
def test_gradients_stay_whole_where_one_of_a_chunk_was_read_before_homes_move(then: str) -> None:
    ours, plain = Trained({**IN_RAM, "host_memory": "300KiB"}), Trained(None)
    norms: dict[Trained, list[float]] = {ours: [], plain: []}
    for number in range(3):
        for each in (ours, plain):
            add_gradients(each, number)
            norms[each].append(float(each.model[0].bias.grad.norm()))
        resize(ours, host=(300 if number % 2 else 4096) * KIB)
        for each in (ours, plain):
            if then == "zero_grad":
                each.optimizer.zero_grad(set_to_none=False)
            if then == "read":
                norms[each] += [float(p.grad.norm()) for p in each.model.parameters()]
            add_gradients(each, number + 100)
            each.optimizer.step()
            each.optimizer.zero_grad()
    assert norms[ours] == norms[plain]
    check_same(ours, plain)


def test_memory_that_somebody_holds_stays_where_it_is() -> None:
    ours, plain = Trained(IN_RAM), Trained(None)
    held = [[p.data for p in list(each.model.parameters())[:2]] for each in (ours, plain)]
    least(ours)
    for number in range(2):
        assert step(ours, number) == step(plain, number)
    for data in zip(*held, strict=True):
        assert torch.equal(*data)
    check_same(ours, plain)


HELD: dict[str, Callable[[Any], Any]] = {
    "p.data": lambda p: p.data,
    "p.detach()": lambda p: p.detach(),
    "a view": lambda p: p.detach().view(-1)[1:],
    "an array": lambda p: p.detach().numpy(),
    "a capsule": lambda p: torch.from_dlpack(p.detach()),
    "a storage": lambda p: p.untyped_storage(),
    "p.grad": lambda p: p.grad,
    "a view of p.grad": lambda p: p.grad.view(-1)[1:],
    "an array of p.grad": lambda p: p.grad.numpy(),
    "a detached p.grad": lambda p: p.grad.detach(),
    "p.grad of theirs": lambda p: setattr(p, "grad", torch.ones_like(p)) or p.grad,
    "nothing": lambda p: None,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("placement", [IN_RAM, APART], ids=["one RAM", "a device of its own"])
@pytest.mark.parametrize("how", HELD)
def test_what_somebody_holds_is_named_where_homes_have_no_place_because_of_it(
    how: str, placement: dict[str, Any]
) -> None:
    ours, plain = Trained(placement), Trained(None)
    most, smallest = capacity(ours), least(ours)
    resize(ours, host=most)
    is_gradient = "grad" in how or how == "nothing"
    if is_gradient:
        for each in (ours, plain):
            add_gradients(each, 0)
    parameters = list(ours.model.parameters())
    held = [HELD[how](p) for p in parameters]
    names = [name for name, _ in ours.model.named_parameters()]
    text = ""
    try:
        resize(ours, host=smallest)
    except OutOfMemory as error:
        text = str(error)
        assert capacity(ours) == most
        named = {"nothing": "the gradients of", "a storage": "addresses of"}
        assert named.get(how, "the gradient of" if is_gradient else "memory of") in text
        assert any(name in text for name in names)
        assert ("or hold a clone" in text) == (how not in named)
        assert ("zero_grad()" in text) == is_gradient
    assert text or placement is APART or (is_gradient and how != "p.grad")
    del held
    if how == "a storage":
        assert "run a forward, until which addresses of" in text
        for each in (ours, plain):
            each.loss(7)
    for each in (ours, plain):
        each.optimizer.zero_grad()
    resize(ours, host=smallest)
    for number in range(2):
        assert step(ours, number) == step(plain, number)
    check_same(ours, plain)


def test_averages_and_parameters_unfrozen_since_move_along() -> None:
    ours, other = (HalfFrozen(IN_RAM, precision="bf16") for _ in range(2))
    most, averages = capacity(ours), [gemini.EMA(each.model) for each in (ours, other)]
    for number in range(2):
        resize(ours, host=most) if number % 2 else least(ours)
        assert step(ours, number) == step(other, number)
    for mine, theirs in zip(*(list(average.named_tensors()) for average in averages), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
    for average in averages:
        average.close()
    for each in (ours, other):
        for parameter in each.model.parameters():
            parameter.requires_grad_(True)
    for number in range(2, 5):
        resize(ours, host=most) if number % 2 else least(ours)
        assert step(ours, number) == step(other, number)
    check_alike(ours, other)


def test_a_disk_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = Trained(IN_RAM), Trained(None)
    assert step(ours, 0) == step(plain, 0)
    writes, write = [0], DiskBuffer.write

    def failing(self: DiskBuffer, start: int, source: Tensor) -> None:
        writes[0] += 1
        if writes[0] > 5:
            raise OffloadError(5, "the disk is gone")
        write(self, start, source)

    before = dict(boosted(ours.model).manager.ledger._used)
    monkeypatch.setattr(DiskBuffer, "write", failing)
    with pytest.raises(OffloadError, match="the disk is gone"):
        least(ours)
    monkeypatch.undo()
    assert bytes_on(ours, Tier.DISK) == 0
    assert boosted(ours.model).manager.ledger._used == before and capacity(ours) == 4096 * KIB
    assert step(ours, 1) == step(plain, 1)
    check_same(ours, plain)


def test_what_has_no_place_is_refused_before_anything_changes() -> None:
    ours = Trained({"host_memory": "4MiB", **SMALL})
    before = bytes_on(ours, Tier.HOST)
    with pytest.raises(OutOfMemory, match=r"offload_dir"):
        resize(ours, host=100 * KIB)
    with pytest.raises(ValueError, match="at least 0 bytes"):
        resize(ours, host=-1)
    with pytest.raises(ValueError, match="one capacity"):
        resize(ours, host=KIB, device=2 * KIB)
    assert bytes_on(ours, Tier.HOST) == before and capacity(ours) == 4096 * KIB


def test_inside_of_a_forward_it_is_refused() -> None:
    ours, plain = Trained(IN_RAM), Trained(None)

    def hook(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="between steps"):
            resize(ours, host=150 * KIB)

    handle = ours.model[0].register_forward_hook(hook)
    assert step(ours, 0) == step(plain, 0)
    handle.remove()
    least(ours)
    assert step(ours, 1) == step(plain, 1)
    check_same(ours, plain)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "split"])
def test_an_old_graph_finds_its_numbers_when_homes_have_moved(kind: str) -> None:
    ours, other = (Trained(IN_RAM, **KINDS[kind]) for _ in range(2))
    assert boosted(ours.model).manager.ledger.memory is MemoryMap.UNIFIED
    most = capacity(ours)
    for number in range(4):
        losses = []
        for each in (ours, other):
            torch.manual_seed(number)
            losses.append(each.loss(number))
        resize(ours, host=most) if number % 2 else least(ours)
        for each, loss in zip((ours, other), losses, strict=True):
            each.backward(loss)
            each.optimizer.step()
            each.optimizer.zero_grad()
        assert losses[0].item() == losses[1].item()
    check_alike(ours, other)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "split"])
def test_in_a_first_forward_homes_leave_before_memory_has_run_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (Trained(IN_RAM, **KINDS[kind]) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(Foresight, "lacking", lambda *_: 2048 * KIB)
        loss = step(ours, 0)
    assert bytes_on(ours, Tier.DISK) > 0
    assert loss == step(other, 0) and step(ours, 1) == step(other, 1)
    check_alike(ours, other)


def test_homes_come_back_when_there_is_room_again() -> None:
    ours, other = Trained(IN_RAM, "bf16"), Trained(IN_RAM, "bf16")
    for number in range(2):
        assert step(ours, number) == step(other, number)
    memory = boosted(ours.model).engine.memory
    smallest = least(ours)
    boosted(ours.model).engine.resize({Tier.HOST: smallest})
    memory._most_bytes = 4096 * KIB
    memory._looked_at = 0.0
    assert bytes_on(ours, Tier.DISK) > 0
    assert step(ours, 2) == step(other, 2)
    assert bytes_on(ours, Tier.DISK) == 0
    check_alike(ours, other)


def test_growth_that_was_seen_goes_on_and_backward_takes_some_more() -> None:
    mib, foresight = 1 << 20, Foresight()
    foresight.begin()
    assert foresight.lacking(0.1, 100 * mib, 1000 * mib, 0) == 0
    assert foresight.lacking(0.15, 110 * mib, 1000 * mib, 0) == 0  # too early to tell
    # 200 MiB in half of it: 160 to come, and a quarter of 400 in backward; 48 MiB stay free.
    assert foresight.lacking(0.6, 300 * mib, 300 * mib, 20 * mib) == (160 + 100 + 20 + 48 - 300) * mib
    assert foresight.lacking(1.0, 500 * mib, 30 * mib, 0) == 18 * mib


def test_homes_do_not_swing() -> None:
    mib = 1 << 20
    most = 1024 * mib

    def next_capacity(capacity: int, free: int) -> int:
        return capacity_between_steps(capacity * mib, most, free * mib, 0, 100 * mib) // mib

    assert next_capacity(1024, 96) == 1024 - 16  # what is to stay free is missing
    assert next_capacity(512, 300) == 512  # there is room, but hardly more than what is to stay free
    assert next_capacity(512, 500) == 512 + 500 - 100 - 48 - 128
    assert next_capacity(1000, 500) == next_capacity(1024, 5000) == 1024
    raised = next_capacity(512, 500)
    assert next_capacity(raised, 500 - (raised - 512)) == raised


def test_a_unit_has_its_full_copy_where_homes_have_made_way_for_too_much(tmp_path: Path) -> None:
    """What is left was enough for what had been needed at once until then. The next unit may need more."""
    ours, plain = Trained({"host_memory": "310KiB", "offload_dir": tmp_path, **SMALL}), Trained(None)
    for number in range(2):
        assert step(ours, number) == step(plain, number)
    manager = boosted(ours.model).manager
    manager.settle()
    manager.eviction.evict_idle()
    manager.ledger.resize(Tier.HOST, manager.ledger.used(Tier.HOST) + KIB)  # as where activations needed the rest
    assert max(chunk.full_nbytes for chunk in manager.chunks) > KIB
    for number in range(2, 4):
        assert step(ours, number) == step(plain, number)
    assert ours.model.memory_stats()["device/overdraft_peak_bytes"] > 0
    check_same(ours, plain)
