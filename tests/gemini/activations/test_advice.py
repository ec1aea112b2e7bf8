"""The policy "auto": safe before anything is known, without hooks where everything fits, anew after changes."""

from dataclasses import dataclass, replace

import pytest

from gemini.activations.advice import AFTER_SHORTAGE, REST, SETTLED, Advice, Always, Auto, Forward
from gemini.memory.non_model import Batch
from gemini.planning.activation_choice import Choice, Link, UnitCost

MIB = 1 << 20
BLOCKS = 8
FAST = Link(down_bytes_per_second=1e12, up_bytes_per_second=1e12, ahead_bytes=MIB)


def batch_of(length: int, with_gradients: bool = True) -> Batch:
    return Batch(with_gradients, ((1, length),))


@dataclass
class Machine:
    """What the policy asks of it."""

    room_bytes: int
    link: Link | None = FAST
    asked: int = 0

    def policy(self) -> Auto:
        def link() -> Link | None:
            self.asked += 1
            return self.link

        return Auto(BLOCKS, lambda: self.room_bytes, link)


def cost_of(block: int, length: int) -> UnitCost:
    return UnitCost(
        unit=block,
        saved_bytes=34 * length * 1024,
        movable_bytes=34 * length * 1024,
        input_bytes=2 * length * 1024,
        forward_seconds=0.1,
    )


def run(advice: Advice, length: int) -> tuple[Forward | None, list[Choice]]:
    """A forward: what was chosen for each block when it ended."""
    forward = advice.begin(batch_of(length))
    if forward is None:
        return None, [Choice.KEEP] * BLOCKS
    chosen = []
    for block in range(BLOCKS):
        choice = forward.choice(block)
        chosen.append(forward.block_ended(cost_of(block, length)) if forward.is_measured else choice)
        advice.block_took(block, 0.1)
    if forward.is_measured:
        advice.ended(MIB, 0)
    return forward, chosen


def test_where_everything_fits_the_second_forward_has_no_hooks_and_no_disk_was_measured() -> None:
    machine = Machine(1 << 40)
    auto = machine.policy()
    first, chosen = run(auto, 100)
    assert first is not None and first.is_measured
    assert set(chosen) == {Choice.KEEP}
    assert run(auto, 100)[0] is None
    assert machine.asked == 0


def test_a_forward_without_gradients_has_no_hooks() -> None:
    assert Machine(0).policy().begin(batch_of(100, with_gradients=False)) is None
    assert Always(Choice.RECOMPUTE, 2).begin(batch_of(100, with_gradients=False)) is None


def test_the_first_forward_chooses_when_its_first_block_has_ended() -> None:
    chosen = run(Machine(150 * 100 * 1024).policy(), 100)[1]
    assert chosen[0] is Choice.OFFLOAD
    assert chosen[-1] is Choice.KEEP


def test_without_a_tier_below_blocks_run_again() -> None:
    chosen = run(Machine(150 * 100 * 1024, link=None).policy(), 100)[1]
    assert chosen[0] is Choice.RECOMPUTE


def test_a_heavier_batch_is_measured_and_a_lighter_one_is_not() -> None:
    auto = Machine(1 << 40).policy()
    run(auto, 100)
    assert run(auto, 50)[0] is None
    heavier = run(auto, 200)[0]
    assert heavier is not None and heavier.is_measured
    assert run(auto, 200)[0] is None


def test_a_lighter_batch_keeps_more() -> None:
    auto = Machine(150 * 100 * 1024).policy()
    run(auto, 100)
    heavy = [choice is Choice.KEEP for choice in run(auto, 100)[1]]
    light = [choice is Choice.KEEP for choice in run(auto, 60)[1]]
    assert 0 < sum(heavy) < sum(light)


def test_after_a_shortage_less_is_kept() -> None:
    auto = Machine(180 * 100 * 1024).policy()
    for _ in range(SETTLED + 2):
        before = run(auto, 100)[1]
    auto.ran_short()
    after = run(auto, 100)[1]
    assert before.count(Choice.KEEP) > after.count(Choice.KEEP)
    assert AFTER_SHORTAGE < 1


@pytest.mark.parametrize("room", [1 << 30, 1 << 40])
@pytest.mark.parametrize("length", [100, 60])
def test_after_a_shortage_less_is_kept_however_much_room_was_found(room: int, length: int) -> None:
    auto = Machine(room).policy()
    run(auto, 100)
    kept = run(auto, length)[1].count(Choice.KEEP)
    assert kept == BLOCKS
    for _ in range(3):
        auto.ran_short()
        less = run(auto, length)[1].count(Choice.KEEP)
        assert less < kept
        kept = less


def test_a_heavier_batch_after_a_shortage_takes_no_more_than_the_lighter_one() -> None:
    auto = Machine(1 << 40).policy()
    run(auto, 100)
    run(auto, 100)
    auto.ran_short()
    assert run(auto, 200)[1].count(Choice.KEEP) < BLOCKS / 2


def test_choices_settle_after_some_forwards() -> None:
    machine = Machine(150 * 100 * 1024)
    auto = machine.policy()
    for _ in range(SETTLED + 1):
        run(auto, 100)
    asked = machine.asked
    run(auto, 100)
    assert machine.asked == asked


def test_the_shortest_time_of_a_block_counts() -> None:
    auto = Machine(0).policy()
    run(auto, 100)
    auto.block_took(0, 0.01)
    auto.block_took(0, 5.0)
    assert auto._measured is not None
    assert auto._measured.costs[0].forward_seconds == 0.01


def test_blocks_that_did_not_run_are_taken_to_be_like_the_largest() -> None:
    auto = Machine(0).policy()
    forward = auto.begin(batch_of(100))
    assert forward is not None
    forward.block_ended(cost_of(0, 100))
    auto.ended(0, 0)
    second = auto.begin(batch_of(100))
    assert second is not None
    assert second.choice(5) is not Choice.KEEP


@pytest.mark.parametrize("choice", [Choice.OFFLOAD, Choice.RECOMPUTE])
def test_a_fixed_policy_says_the_same_of_all_blocks(choice: Choice) -> None:
    forward = Always(choice, BLOCKS).begin(batch_of(1))
    assert forward is not None and not forward.is_measured
    assert {forward.choice(block) for block in range(BLOCKS)} == {choice}
    assert forward.choice(REST) is (Choice.OFFLOAD if choice is Choice.OFFLOAD else Choice.KEEP)


def test_two_visits_of_a_block_add_up() -> None:
    auto = Machine(0).policy()
    forward = auto.begin(batch_of(100))
    assert forward is not None
    for cost in (cost_of(0, 100), replace(cost_of(0, 100), can_recompute=False)):
        forward.block_ended(cost)
    auto.ended(0, 0)
    assert auto._measured is not None
    assert auto._measured.costs[0].saved_bytes == 2 * cost_of(0, 100).saved_bytes
    assert not auto._measured.costs[0].can_recompute
