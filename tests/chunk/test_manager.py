"""The chunk manager: states, bytes and values, on a fake device that counts every byte."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fakes import FakeBackend, FakeUpdate
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from gemini.chunk import (
    Chunk,
    ChunkManager,
    ChunkPlan,
    ChunkState,
    DiskBackend,
    Ledger,
    Role,
    StateSlot,
    TensorSpec,
    Tier,
    pack,
)
from gemini.errors import OffloadError, OutOfMemory, StateError

NUMEL = 96
FULL_NBYTES = NUMEL * 2  # bf16
TRAINABLE = dict.fromkeys((Role.MASTER, Role.STATE_0, Role.STATE_1, Role.GRADIENT), Tier.HOST)
FROZEN = {Role.MASTER: Tier.HOST}
ADAM = (StateSlot("exp_avg"), StateSlot("exp_avg_sq"))


class Rig:
    """Chunks of two parameters each (33 and 20 elements), with known values, bound to parameters."""

    def __init__(
        self,
        homes: Sequence[dict[Role, Tier]],
        room: int = 2,
        unified: bool = False,
        disk: DiskBackend | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        layouts = pack([TensorSpec(f"w{i}", (n,), (1,), i // 2) for i, n in enumerate([33, 20] * len(homes))], 100)
        assert all(layout.numel == NUMEL for layout in layouts)
        self.capacity = room * NUMEL * dtype.itemsize
        capacities = {Tier.DEVICE: self.capacity, Tier.HOST: 1 << 20, Tier.DISK: 1 << 20}
        self.ledger = Ledger(capacities, unified)
        self.device = FakeBackend(self.capacity if not unified else 1 << 30)
        plans = [ChunkPlan(layout, tiers, dtype, ADAM) for layout, tiers in zip(layouts, homes, strict=True)]
        self.manager = ChunkManager(plans, self.ledger, self.device, disk)
        self.chunks = self.manager.chunks
        generator = torch.Generator().manual_seed(0)
        self.values: dict[int, list[Tensor]] = {}
        self.parameters: dict[int, list[Tensor]] = {}
        for chunk in self.chunks:
            self.values[chunk.index] = [torch.randn(slot.shape, generator=generator) for slot in chunk.layout.slots]
            self.parameters[chunk.index] = [torch.empty(slot.shape, dtype=dtype) for slot in chunk.layout.slots]
            for position, value in enumerate(self.values[chunk.index]):
                self.manager.write_slot(chunk, position, Role.MASTER, value)
                self.manager.bind(self.parameters[chunk.index][position], chunk, position)

    def use(self, chunk: Chunk) -> None:
        self.manager.fetch(chunk)
        self.manager.pin(chunk)
        self.manager.unpin(chunk)

    def has_values(self, chunk: Chunk) -> bool:
        pairs = zip(self.parameters[chunk.index], self.values[chunk.index], strict=True)
        return all(torch.equal(parameter, value.to(parameter.dtype)) for parameter, value in pairs)

    def is_poisoned(self, chunk: Chunk) -> bool:
        return all(
            bool(p.isnan().all()) and p.untyped_storage().nbytes() == p.element_size() and p.shape == v.shape
            for p, v in zip(self.parameters[chunk.index], self.values[chunk.index], strict=True)
        )

    def used_bytes_agree(self) -> bool:
        return self.ledger.used(Tier.DEVICE) == sum(c.full_nbytes for c in self.chunks if c.is_resident)


# -- fetching, pinning, evicting


def test_parameters_read_nan_while_away_and_their_values_while_pinned() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    for chunk in rig.chunks:
        assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
        rig.manager.fetch(chunk)
        rig.manager.pin(chunk)
        assert chunk.state is ChunkState.IN_USE and rig.has_values(chunk)
        rig.manager.unpin(chunk)
        assert chunk.state is ChunkState.READY and rig.has_values(chunk)
        rig.manager.evict(chunk)
        assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
        assert chunk.full.untyped_storage().nbytes() == 0


def test_a_view_that_autograd_kept_sees_the_values_again_after_a_fetch() -> None:
    rig = Rig([TRAINABLE])
    rig.use(rig.chunks[0])
    kept = rig.parameters[0][0].view(3, 11)
    rig.manager.evict(rig.chunks[0])
    rig.use(rig.chunks[0])
    assert torch.equal(kept, rig.values[0][0].bfloat16().view(3, 11))


def test_fetching_what_is_there_moves_nothing() -> None:
    rig = Rig([TRAINABLE])
    rig.use(rig.chunks[0])
    before = list(rig.device.log)
    rig.manager.fetch(rig.chunks[0])
    assert rig.device.log == before and rig.manager.moves.fetch_count == 1


def test_nested_pins_hold_until_the_last_one_goes() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.manager.fetch(chunk)
    for _ in range(3):
        rig.manager.pin(chunk)
    for _ in range(2):
        rig.manager.unpin(chunk)
        assert chunk.state is ChunkState.IN_USE
        with pytest.raises(StateError):
            rig.manager.evict(chunk)
        assert rig.has_values(chunk)
    rig.manager.unpin(chunk)
    rig.manager.evict(chunk)
    assert chunk.pins == 0 and rig.ledger.used(Tier.DEVICE) == 0


def test_what_was_not_asked_for_first_raises() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    with pytest.raises(StateError, match="chunk 0: HOME -> IN_USE"):
        rig.manager.pin(chunk)
    with pytest.raises(StateError, match="chunk 0: HOME -> HOME"):
        rig.manager.evict(chunk)
    with pytest.raises(AssertionError, match="chunk 0 is not pinned"):
        rig.manager.unpin(chunk)
    assert chunk.state is ChunkState.HOME and chunk.pins == 0 and rig.used_bytes_agree()


def test_a_prefetched_chunk_arrives_when_it_is_pinned_and_is_counted() -> None:
    rig = Rig([TRAINABLE, TRAINABLE])
    first, second = rig.chunks
    rig.manager.fetch(first, background=True)
    rig.manager.fetch(second)
    assert first.state is ChunkState.FETCHING and not first.has_arrived and rig.is_poisoned(first)
    assert second.has_arrived
    rig.manager.pin(first)
    rig.manager.pin(first)
    assert rig.has_values(first)
    moves = rig.manager.moves
    assert (moves.fetch_count, moves.prefetch_count, moves.prefetch_used, moves.demand_count) == (2, 1, 1, 1)
    assert moves.fetch_bytes == 2 * NUMEL * 2


# -- room


def test_the_least_recently_used_chunk_goes_first() -> None:
    rig = Rig([TRAINABLE] * 4, room=3)
    a, b, c, d = rig.chunks
    for chunk in (a, b, c, a):
        rig.use(chunk)
    rig.manager.fetch(d)
    assert [chunk.is_resident for chunk in rig.chunks] == [True, False, True, True]


def test_a_chunk_that_is_arriving_goes_after_all_that_are_idle() -> None:
    rig = Rig([TRAINABLE] * 3, room=2)
    a, b, c = rig.chunks
    rig.manager.fetch(a, background=True)
    rig.use(b)
    rig.manager.fetch(c)
    assert [chunk.is_resident for chunk in rig.chunks] == [True, False, True]
    rig.manager.pin(c)
    rig.manager.fetch(b)
    assert [chunk.is_resident for chunk in rig.chunks] == [False, True, True]


def test_what_is_to_be_kept_is_not_evicted_although_nothing_has_pinned_it_yet() -> None:
    rig = Rig([TRAINABLE] * 4, room=3)
    a, b, c, d = rig.chunks
    rig.manager.fetch(a, background=True)
    rig.use(b)
    rig.use(c)
    rig.manager.fetch(d, keep=[a, b])
    assert [chunk.is_resident for chunk in rig.chunks] == [True, True, False, True]
    with pytest.raises(OutOfMemory):
        rig.manager.fetch(c, keep=[a, b, d])
    assert rig.used_bytes_agree()


def test_what_is_in_use_is_never_evicted_and_the_message_says_how_much_is_enough() -> None:
    rig = Rig([TRAINABLE] * 3, room=2)
    for chunk in rig.chunks[:2]:
        rig.manager.fetch(chunk)
        rig.manager.pin(chunk)
    with pytest.raises(OutOfMemory) as raised:
        rig.manager.fetch(rig.chunks[2])
    message = str(raised.value)
    assert "device tier out of memory" in message and "(with w4)" in message
    assert "0.0 MiB are free" in message
    enough = int(message.split("set device_memory to ")[1].split()[0])
    assert enough == rig.capacity + NUMEL * 2
    assert rig.chunks[2].state is ChunkState.HOME and rig.used_bytes_agree()
    assert all(rig.has_values(chunk) for chunk in rig.chunks[:2])

    rig.ledger.resize(Tier.DEVICE, enough)
    rig.device.capacity_bytes = enough
    rig.use(rig.chunks[2])
    assert rig.has_values(rig.chunks[2])


def test_with_one_ram_for_both_the_message_names_host_memory() -> None:
    rig = Rig([TRAINABLE] * 2, unified=True)
    rig.ledger.resize(Tier.HOST, 0)  # to what is used
    with pytest.raises(OutOfMemory, match="host tier out of memory") as raised:
        rig.manager.fetch(rig.chunks[0])
    enough = int(str(raised.value).split("set host_memory to ")[1].split()[0])
    assert enough == rig.ledger.used(Tier.HOST) + NUMEL * 2
    rig.ledger.resize(Tier.HOST, enough)
    rig.use(rig.chunks[0])


def test_a_home_in_reach_of_the_device_is_the_full_copy_and_never_moves() -> None:
    rig = Rig([FROZEN, TRAINABLE], unified=True)
    frozen, trainable = rig.chunks
    assert frozen.full_is_home and not trainable.full_is_home and frozen.full_nbytes == 0
    assert frozen.state is ChunkState.READY and rig.has_values(frozen)
    pointer = rig.parameters[0][0].data_ptr()
    rig.manager.evict(frozen)
    rig.manager.make_room(trainable)
    rig.use(frozen)
    assert rig.has_values(frozen) and rig.parameters[0][0].data_ptr() == pointer
    assert rig.manager.moves.fetch_count == 0 and rig.device.log == []


@pytest.mark.parametrize("name", ["grow", "upload"])
def test_a_fetch_that_cannot_begin_gives_the_memory_back(name: str) -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.device.fail[name] = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="the device is lost"):
        rig.manager.fetch(chunk)
    assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
    assert rig.ledger.used(Tier.DEVICE) == rig.device.used_bytes == 0
    assert chunk.full.untyped_storage().nbytes() == 0
    rig.use(chunk)
    assert rig.has_values(chunk) and rig.manager.moves.fetch_count == 1


@pytest.mark.parametrize("then", ["pin", "evict", "write", "fetch another"])
def test_a_prefetch_that_fails_on_the_way_gives_the_memory_back(then: str) -> None:
    rig = Rig([TRAINABLE, TRAINABLE], room=1)
    chunk, other = rig.chunks
    rig.manager.fetch(chunk, background=True)
    rig.device.transfers[-1].error = OffloadError(5, "read error")
    actions = {
        "pin": lambda: rig.manager.pin(chunk),
        "evict": lambda: rig.manager.evict(chunk),
        "write": lambda: rig.manager.write(rig.parameters[0][0], Role.MASTER, torch.zeros(33)),
        "fetch another": lambda: rig.manager.fetch(other),
    }
    with pytest.raises(OffloadError, match="read error"):
        actions[then]()
    assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
    assert rig.ledger.used(Tier.DEVICE) == rig.device.used_bytes == 0
    rig.use(chunk)
    assert rig.has_values(chunk)


# -- pending updates


def pending(rig: Rig, chunk: Chunk, value: float = 3.0) -> FakeUpdate:
    """An update that writes ``value`` into the master, and through to a full copy, when it is waited for."""

    def work() -> None:
        master = chunk.homes[Role.MASTER]
        master.write(0, torch.full((NUMEL,), value, dtype=master.dtype))
        if chunk.is_resident:
            chunk.full.fill_(value)

    update = FakeUpdate(work)
    chunk.update = update
    chunk.poison()
    rig.values[chunk.index] = [torch.full_like(v, value) for v in rig.values[chunk.index]]
    return update


def test_a_pin_waits_for_the_update_and_shows_its_values() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    update = pending(rig, chunk)
    assert rig.is_poisoned(chunk) and update.waits == 0
    rig.manager.pin(chunk)
    assert update.waits == 1 and chunk.update is None and rig.has_values(chunk)


def test_a_fetch_reads_what_the_update_leaves() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    pending(rig, chunk)
    rig.manager.fetch(chunk, background=True)
    rig.manager.pin(chunk)
    assert rig.has_values(chunk)


def test_an_eviction_waits_for_the_update_that_may_write_to_the_full_copy() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    update = pending(rig, chunk)
    rig.manager.evict(chunk)
    assert update.waits == 1 and chunk.state is ChunkState.HOME
    rig.use(chunk)
    assert rig.has_values(chunk)


@pytest.mark.parametrize("action", ["fetch", "pin", "evict", "read", "write", "settle"])
def test_a_failed_update_surfaces_at_each_call_until_it_succeeds_and_nothing_is_lost(action: str) -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    if action in ("pin", "evict"):
        rig.use(chunk)
    update = pending(rig, chunk)
    update.error = OffloadError(5, "write error")
    state, used = chunk.state, rig.ledger.used(Tier.DEVICE)
    actions = {
        "fetch": lambda: rig.manager.fetch(chunk),
        "pin": lambda: rig.manager.pin(chunk),
        "evict": lambda: rig.manager.evict(chunk),
        "read": lambda: rig.manager.read(rig.parameters[0][0], Role.STATE_0),
        "write": lambda: rig.manager.write(rig.parameters[0][0], Role.STATE_0, torch.zeros(33)),
        "settle": rig.manager.settle,
    }
    for _ in range(2):
        with pytest.raises(OffloadError, match="write error"):
            actions[action]()
        assert (chunk.state, rig.ledger.used(Tier.DEVICE), chunk.pins) == (state, used, 0)
        assert rig.is_poisoned(chunk)
    update.error = None
    actions[action]()
    rig.use(chunk) if chunk.pins == 0 else None
    assert rig.has_values(chunk)


def test_settling_shows_the_parameters_of_resident_chunks_again() -> None:
    rig = Rig([TRAINABLE, TRAINABLE])
    here, away = rig.chunks
    rig.use(here)
    for chunk in rig.chunks:
        pending(rig, chunk)
    rig.manager.settle()
    assert rig.has_values(here) and rig.is_poisoned(away)
    assert here.update is None and away.update is None


# -- values


ROLES = [Role.MASTER, Role.STATE_0, Role.STATE_1]


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("role", ROLES)
def test_values_are_read_back_as_written_on_every_tier(tier: Tier, role: Role, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, False))
    homes = {**TRAINABLE, role: tier}
    rig = Rig([homes, homes], room=20, disk=disk)
    for chunk in rig.chunks:
        for parameter in rig.parameters[chunk.index]:
            value = torch.randn(parameter.shape, dtype=torch.float64)
            rig.manager.write(parameter, role, value)
            assert torch.equal(rig.manager.read(parameter, role), value.float())
            copy = rig.manager.read(parameter, role)
            copy.fill_(0)
            assert torch.equal(rig.manager.read(parameter, role), value.float())
    rig.manager.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_value_of_the_wrong_shape_is_refused(tier: Tier, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, False))
    rig = Rig([{**TRAINABLE, Role.STATE_0: tier}], disk=disk)
    before = rig.manager.read(rig.parameters[0][1], Role.STATE_0)
    longer = torch.ones(100)[:19]  # its storage is long enough
    with pytest.raises(RuntimeError, match=r"20|19"):
        rig.manager.write(rig.parameters[0][1], Role.STATE_0, longer)
    assert torch.equal(rig.manager.read(rig.parameters[0][1], Role.STATE_0), before)
    rig.manager.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_strided_values_keep_their_elements_in_place(tier: Tier, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, False))
    conv = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    layouts = pack([TensorSpec("b", (3,), (1,)), TensorSpec("conv", tuple(conv.shape), conv.stride())], 1000)
    ledger = Ledger({Tier.DEVICE: 10_000, Tier.HOST: 10_000}, False)
    plan = ChunkPlan(layouts[0], {**TRAINABLE, Role.MASTER: tier}, torch.float32, ADAM)
    manager = ChunkManager([plan], ledger, FakeBackend(10_000), disk)
    (chunk,) = manager.chunks
    parameter = torch.nn.Parameter(conv)
    manager.bind(parameter, chunk, 1)
    for value in (conv, conv.contiguous()):
        manager.write(parameter, Role.MASTER, torch.zeros(()).expand(conv.shape))
        manager.write(parameter, Role.MASTER, value)
        assert torch.equal(manager.read(parameter, Role.MASTER), conv)
    manager.fetch(chunk)
    manager.pin(chunk)
    assert parameter.stride() == conv.stride() and torch.equal(parameter, conv)
    manager.close()


def test_writing_a_master_drops_the_full_copy_and_writing_a_moment_does_not() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    rig.manager.write(rig.parameters[0][0], Role.STATE_0, torch.ones(33))
    assert chunk.state is ChunkState.READY
    rig.manager.write(rig.parameters[0][0], Role.MASTER, torch.ones(33))
    assert chunk.state is ChunkState.HOME
    rig.values[0][0] = torch.ones(33)
    rig.use(chunk)
    assert rig.has_values(chunk)


def test_parameters_are_found_and_strangers_are_not() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    assert rig.manager.find(rig.parameters[1][1]) == (rig.chunks[1], 1)
    assert rig.manager.slot(rig.parameters[1][1]).name == "w3"
    assert rig.manager.find(torch.zeros(3)) is None


# -- building


def test_states_are_fp32_and_everything_else_has_the_compute_dtype() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    trainable, frozen = rig.chunks
    assert {role: home.dtype for role, home in trainable.homes.items()} == dict.fromkeys(ROLES, torch.float32)
    assert trainable.gradient is not None and trainable.gradient.buffer.dtype is torch.bfloat16
    assert frozen.homes[Role.MASTER].dtype is torch.bfloat16 and frozen.gradient is None
    assert list(frozen.homes) == [Role.MASTER]


def test_homes_are_counted_and_the_full_copies_are_not_until_they_are_fetched() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    assert rig.ledger.used(Tier.HOST) == NUMEL * (3 * 4 + 2) + NUMEL * 2
    assert rig.ledger.used(Tier.DEVICE) == 0


def test_a_home_without_room_names_the_role_and_a_parameter() -> None:
    layouts = pack([TensorSpec("layers.0.weight", (64,), (1,))], 64)
    plan = ChunkPlan(layouts[0], TRAINABLE, torch.bfloat16, ADAM)
    with pytest.raises(OutOfMemory, match=r"exp_avg_sq of chunk 0 \(with layers.0.weight\)"):
        ChunkManager([plan], Ledger({Tier.HOST: 64 * 8 + 100}, False), FakeBackend(0), None)


def test_closing_ends_the_device_and_the_disk(tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, False))
    rig = Rig([{Role.MASTER: Tier.DISK}], disk=disk)
    rig.manager.close()
    assert rig.device.log[-1] == ("close",)
    with pytest.raises(OffloadError):
        rig.manager.read(rig.parameters[0][0], Role.MASTER)


# -- any sequence of calls


class Calls(RuleBasedStateMachine):
    """Whatever is called in whatever order, no byte is lost and no value is wrong."""

    @initialize(kinds=st.lists(st.sampled_from(["trainable", "frozen", "on device"]), min_size=1, max_size=5),
                room=st.integers(1, 3), unified=st.booleans())  # fmt: skip
    def begin(self, kinds: list[str], room: int, unified: bool) -> None:
        homes = {"trainable": TRAINABLE, "frozen": FROZEN, "on device": {Role.MASTER: Tier.DEVICE}}
        on_device = kinds.count("on device") * NUMEL * 2
        self.rig = Rig([homes[kind] for kind in kinds], room + kinds.count("on device"), unified)
        if unified:
            self.rig.ledger.resize(Tier.HOST, self.rig.ledger.used(Tier.HOST) + room * NUMEL * 2)
        self.home_nbytes = self.rig.ledger.used(Tier.DEVICE)
        assert self.home_nbytes == on_device
        self.updates: list[FakeUpdate] = []
        self.next_value = 1.0

    def chunk(self, index: int) -> Chunk:
        return self.rig.chunks[index % len(self.rig.chunks)]

    index = st.integers(0, 100)

    @rule(index=index, background=st.booleans())
    def fetch(self, index: int, background: bool) -> None:
        try:
            self.rig.manager.fetch(self.chunk(index), background=background)
        except OutOfMemory:
            in_use = [c for c in self.rig.chunks if c.is_resident and c.full_nbytes]
            assert all(c.state is ChunkState.IN_USE for c in in_use)
        except (OffloadError, RuntimeError):
            pass

    @rule(index=index)
    def pin(self, index: int) -> None:
        chunk = self.chunk(index)
        try:
            self.rig.manager.pin(chunk)
        except StateError:
            assert chunk.state is ChunkState.HOME
        except OffloadError:
            pass

    @rule(index=index)
    def unpin(self, index: int) -> None:
        if self.chunk(index).pins:
            self.rig.manager.unpin(self.chunk(index))

    @rule(index=index)
    def evict(self, index: int) -> None:
        chunk = self.chunk(index)
        state = chunk.state
        try:
            self.rig.manager.evict(chunk)
        except StateError:
            assert state in (ChunkState.HOME, ChunkState.IN_USE)
        except OffloadError:
            pass

    @rule(index=index, fails=st.booleans())
    def update(self, index: int, fails: bool) -> None:
        chunk = self.chunk(index)
        if chunk.gradient is None or chunk.update is not None or chunk.pins or chunk.state is ChunkState.FETCHING:
            return  # as the optimizer's step does it
        self.next_value += 1.0
        update = pending(self.rig, chunk, self.next_value)
        if fails:
            update.error = OffloadError(5, "update fails")
            self.updates.append(update)

    @rule()
    def disk_recovers(self) -> None:
        for update in self.updates:
            update.error = None

    @rule(name=st.sampled_from(["grow", "upload"]))
    def device_fails(self, name: str) -> None:
        self.rig.device.fail[name] = RuntimeError("device")

    @rule()
    def settle(self) -> None:
        try:
            self.rig.manager.settle()
        except OffloadError:
            pass

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        resident = sum(c.full_nbytes for c in rig.chunks if c.is_resident)
        assert rig.ledger.used(Tier.DEVICE) == self.home_nbytes + resident
        assert rig.device.used_bytes == self.home_nbytes + resident
        for chunk in rig.chunks:
            assert (chunk.pins > 0) == (chunk.state is ChunkState.IN_USE)
            if not chunk.full_is_home:
                assert chunk.full.untyped_storage().nbytes() == (chunk.full_nbytes if chunk.is_resident else 0)
            if chunk.pins:
                assert rig.has_values(chunk)
            elif not chunk.is_resident:
                assert rig.is_poisoned(chunk)
            else:
                assert rig.is_poisoned(chunk) or rig.has_values(chunk)


TestAnySequenceOfCalls = Calls.TestCase
TestAnySequenceOfCalls.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
