"""Counting bytes per tier."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gemini.chunk.ledger import Ledger
from gemini.chunk.memory_map import MemoryMap
from gemini.chunk.tier import Tier
from gemini.errors import OutOfMemory

MIB = 1 << 20
tiers = st.sampled_from(list(Tier))


class LedgerMachine(RuleBasedStateMachine):
    """Random calls next to a model that is a plain list of what was taken."""

    @initialize(capacities=st.dictionaries(tiers, st.integers(0, 100)), memory=st.sampled_from(MemoryMap))
    def begin(self, capacities: dict[Tier, int], memory: MemoryMap) -> None:
        self.ledger = Ledger(capacities, memory)
        self.unified = memory is MemoryMap.UNIFIED
        self.capacities = {tier: capacities.get(tier, 0) for tier in Tier}
        self.taken: list[tuple[Tier, int]] = []
        self.peak = dict.fromkeys(Tier, 0)

    def shared(self, tier: Tier) -> Tier:
        return Tier.HOST if self.unified and tier is Tier.DEVICE else tier

    def sum_of(self, tier: Tier) -> int:
        both = (Tier.HOST, Tier.DEVICE) if self.unified and tier is Tier.HOST else (tier,)
        return sum(nbytes for t, nbytes in self.taken if t in both)

    @rule(tier=tiers, nbytes=st.integers(0, 60))
    def take(self, tier: Tier, nbytes: int) -> None:
        shared = self.shared(tier)
        if self.sum_of(shared) + nbytes <= self.capacities[shared]:
            self.ledger.take(tier, nbytes, "x")
            self.taken.append((tier, nbytes))
            self.peak = {t: max(self.peak[t], self.sum_of(t)) for t in Tier}
        else:
            with pytest.raises(OutOfMemory):
                self.ledger.take(tier, nbytes, "x")

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        if self.taken:
            tier, nbytes = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            self.ledger.give(tier, nbytes)

    @rule(tier=tiers, nbytes=st.integers(0, 120))
    def resize(self, tier: Tier, nbytes: int) -> None:
        self.ledger.resize(tier, nbytes)
        shared = self.shared(tier)
        self.capacities[shared] = max(nbytes, self.sum_of(shared))

    @rule(tier=tiers)
    def give_too_much(self, tier: Tier) -> None:
        own = sum(nbytes for t, nbytes in self.taken if t is tier)
        with pytest.raises(AssertionError):
            self.ledger.give(tier, own + 1)

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for tier in Tier:
            shared = self.shared(tier)
            assert self.ledger.used(tier) == self.sum_of(tier) <= self.ledger.capacity(tier)
            assert self.ledger.capacity(tier) == self.capacities[shared]
            assert self.ledger.free(tier) == self.capacities[shared] - self.sum_of(shared) >= 0
            assert self.ledger.peak(tier) == self.peak[tier]


TestRandomCalls = LedgerMachine.TestCase
TestRandomCalls.settings = settings(deadline=None, max_examples=150, stateful_step_count=20)


def test_device_and_host_share_one_capacity_when_they_are_the_same_ram() -> None:
    ledger = Ledger({Tier.DEVICE: 1000, Tier.HOST: 100}, MemoryMap.UNIFIED)
    ledger.take(Tier.DEVICE, 60, "full copy")
    assert ledger.capacity(Tier.DEVICE) == ledger.capacity(Tier.HOST) == 100
    assert (ledger.used(Tier.DEVICE), ledger.used(Tier.HOST)) == (60, 60)
    assert ledger.free(Tier.DEVICE) == ledger.free(Tier.HOST) == 40
    with pytest.raises(OutOfMemory):
        ledger.take(Tier.HOST, 41, "home")
    ledger.take(Tier.HOST, 40, "home")
    assert (ledger.peak(Tier.DEVICE), ledger.peak(Tier.HOST)) == (60, 100)


def test_tiers_of_their_own_are_counted_apart() -> None:
    ledger = Ledger({Tier.DEVICE: 10, Tier.HOST: 20}, MemoryMap.EMULATED)
    ledger.take(Tier.DEVICE, 10, "x")
    ledger.take(Tier.HOST, 20, "x")
    assert (ledger.used(Tier.DEVICE), ledger.used(Tier.HOST), ledger.free(Tier.DISK)) == (10, 20, 0)


@pytest.mark.parametrize(("memory", "bound"), [(MemoryMap.ACCELERATOR, Tier.DEVICE), (MemoryMap.UNIFIED, Tier.HOST)])
def test_the_message_names_what_to_raise_and_to_how_much_and_that_is_enough(memory: MemoryMap, bound: Tier) -> None:
    capacities = {Tier.DEVICE: 3 * MIB, Tier.HOST: 3 * MIB}
    ledger = Ledger(capacities, memory)
    ledger.take(Tier.DEVICE, 2 * MIB, "x")
    with pytest.raises(OutOfMemory) as raised:
        ledger.take(Tier.DEVICE, MIB + 1, "the full copy of chunk 3")
    message = str(raised.value)
    assert "the full copy of chunk 3 needs 1.0 MiB" in message
    assert f"set {bound.value}_memory to {3 * MIB + 1} bytes" in message
    assert ledger.used(Tier.DEVICE) == ledger.peak(Tier.DEVICE) == 2 * MIB
    ledger.resize(bound, 3 * MIB + 1)
    ledger.take(Tier.DEVICE, MIB + 1, "the full copy of chunk 3")
