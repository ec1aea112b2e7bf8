"""Any sequence of calls leaves the chunk manager consistent."""

from fakes import FakeUpdate
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from manager_rig import FROZEN, NUMEL, TRAINABLE, Rig, pending

from gemini.chunk import MASTER, Chunk, ChunkState, Tier
from gemini.errors import OffloadError, OutOfMemory, StateError


class Calls(RuleBasedStateMachine):
    """Whatever is called in whatever order, no byte is lost and no value is wrong."""

    @initialize(kinds=st.lists(st.sampled_from(["trainable", "frozen", "on device"]), min_size=1, max_size=5),
                room=st.integers(1, 3), unified=st.booleans())  # fmt: skip
    def begin(self, kinds: list[str], room: int, unified: bool) -> None:
        homes = {"trainable": TRAINABLE, "frozen": FROZEN, "on device": {MASTER: Tier.DEVICE}}
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
            assert not chunk.is_resident
        except OffloadError:
            pass

    @rule(index=index)
    def unpin(self, index: int) -> None:
        if self.chunk(index).pins:
            self.chunk(index).unpin()

    @rule(index=index)
    def evict(self, index: int) -> None:
        chunk = self.chunk(index)
        state = chunk.state
        try:
            self.rig.manager.evict(chunk)
        except StateError:
            assert state in (ChunkState.HOME, ChunkState.HOME_UPDATING, ChunkState.IN_USE)
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
