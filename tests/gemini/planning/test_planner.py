"""The plan of a cycle: consistent, within capacity, optimal where that can be known."""

import itertools
from collections.abc import Sequence

import pytest
from belady import belady, play
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemini.planning.cycle import Cycle
from gemini.planning.planner import Actions, Plan, Planner
from gemini.planning.trace import Moment, Phase, Trace


def trace_of(moments: Sequence[Sequence[int]]) -> Trace:
    return Trace(tuple(Moment(i, Phase.FORWARD, frozenset(chunks)) for i, chunks in enumerate(moments)))


def steady(moments: Sequence[Sequence[int]], capacity: int, depth: int, cycles: int = 24) -> tuple[int, int]:
    """Fetches, and those waited for, of the later half of ``cycles`` cycles, with chunks of one byte; all checked."""
    nbytes = {c: 1 for m in moments for c in m}
    played = play(Planner(trace_of(moments), nbytes, capacity, depth), nbytes, capacity, depth, cycles)
    return sum(played.fetched[cycles // 2 :]), sum(played.waited[cycles // 2 :])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Trace, dict[int, int], int, int]:
    chunk_count = draw(st.integers(1, 12))
    chunk = st.integers(0, chunk_count - 1)
    moments = draw(st.lists(st.lists(chunk, max_size=3), max_size=25))
    kind = draw(st.sampled_from(["any", "palindrome", "cycle", "nested"]))
    if kind == "palindrome":
        moments += moments[::-1]
    elif kind == "cycle":
        moments = [[c] for c in range(chunk_count)] * draw(st.integers(1, 2))
    elif kind == "nested":
        moments = [[0, *m] for m in moments]
    unmanaged = draw(st.integers(0, 2))  # the last ones have no full copy of their own
    nbytes = {c: draw(st.sampled_from([1, 1, 1, 2, 5])) for c in range(chunk_count - unmanaged)}
    least = max((sum(nbytes.get(c, 0) for c in set(m)) for m in moments), default=0)
    capacity = draw(st.integers(least, max(least, sum(nbytes.values()) + 2)))
    return trace_of(moments), nbytes, capacity, draw(st.integers(0, 4))


@settings(deadline=None, max_examples=150)
@given(problem=problems(), data=st.data())
def test_a_plan_keeps_every_promise_whatever_it_begins_with(
    problem: tuple[Trace, dict[int, int], int, int], data: st.DataObject
) -> None:
    trace, nbytes, capacity, depth = problem
    lost = data.draw(st.sets(st.sampled_from(sorted(nbytes)))) if nbytes else set()
    resident = data.draw(st.sets(st.sampled_from([*sorted(nbytes), 99])))
    while sum(nbytes.get(c, 0) for c in resident) > capacity:
        resident.pop()
    planner = Planner(trace, nbytes, capacity, depth, lost)
    assert planner.plan().trace is trace
    play(planner, nbytes, capacity, depth, 4, lost, resident - {99})


@settings(deadline=None, max_examples=200)
@given(problem=problems(), data=st.data())
def test_room_that_differs_from_moment_to_moment_is_never_exceeded(
    problem: tuple[Trace, dict[int, int], int, int], data: st.DataObject
) -> None:
    trace, nbytes, capacity, depth = problem
    rooms = [data.draw(st.integers(sum(nbytes.get(c, 0) for c in moment.in_use), capacity)) for moment in trace.moments]
    play(Planner(trace, nbytes, rooms, depth), nbytes, rooms, depth, 4)


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_without_depth_nothing_is_prefetched(problem: tuple[Trace, dict[int, int], int, int]) -> None:
    trace, nbytes, capacity, _ = problem
    plan = Planner(trace, nbytes, capacity, 0).plan()
    assert not plan.between.prefetch and not any(actions.prefetch for actions in plan.actions)


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_where_all_fits_nothing_moves_twice(problem: tuple[Trace, dict[int, int], int, int]) -> None:
    trace, nbytes, _, depth = problem
    planner = Planner(trace, nbytes, sum(nbytes.values()), depth)
    played = play(planner, nbytes, sum(nbytes.values()), depth, 2)
    assert played.fetched[0] == len({c for m in trace.moments for c in m.in_use} & nbytes.keys())
    assert played.fetched[1] == 0


def lru(moments: Sequence[Sequence[int]], capacity: int) -> int:
    """Fetches of one cycle with chunks of one byte, in the steady state of least recently used."""
    order: list[int] = []
    count = 0
    for _ in range(3):
        count = 0
        for chunks in moments:
            for chunk in chunks:
                if chunk in order:
                    order.remove(chunk)
                else:
                    count += 1
                    del order[: max(0, len(order) - capacity + 1)]
                order.append(chunk)
    return count


def optimum(moments: Sequence[Sequence[int]], capacity: int) -> int:
    """The fewest fetches of a cycle that ends as it began, with chunks of one byte, by trying everything."""
    chunks = sorted({c for m in moments for c in m})
    states = [frozenset(s) for n in range(capacity + 1) for s in itertools.combinations(chunks, n)]
    best = 10**9
    for start in states:
        costs = {start: 0}
        for moment in moments:
            after: dict[frozenset[int], int] = {}
            for state, cost in costs.items():
                need = frozenset(moment)
                full = state | need
                new = cost + len(need - state)
                for drop in itertools.combinations(sorted(full - need), max(0, len(full) - capacity)):
                    kept = full - frozenset(drop)
                    after[kept] = min(after.get(kept, 10**9), new)
            costs = after
        best = min(best, *(cost for state, cost in costs.items() if start <= state), 10**9)
    return best


@settings(deadline=None, max_examples=200)
@given(chunks=st.lists(st.integers(0, 4), min_size=1, max_size=9), capacity=st.integers(1, 5))
@example(chunks=[0, 1, 2], capacity=2)
@example(chunks=[0, 1, 2, 3, 4], capacity=3)
def test_a_small_cycle_takes_as_few_fetches_as_any_that_repeats_could(chunks: list[int], capacity: int) -> None:
    moments = [[c] for c in chunks]
    fetched, _ = steady(moments, capacity, 0)
    assert fetched <= 12 * optimum(moments, capacity)  # fewer where the best cycles do not repeat
    assert sum(belady(moments, capacity, 24)[12:]) <= 12 * optimum(moments, capacity)


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize(("chunk_count", "capacity"), [(10, 3), (10, 9), (50, 20), (100, 5)])
def test_forward_and_backward_fetch_what_does_not_fit_twice(chunk_count: int, capacity: int, depth: int) -> None:
    moments = [[c] for c in (*range(chunk_count), *reversed(range(chunk_count)))]
    fetched, waited = steady(moments, capacity, depth)
    assert fetched == 12 * 2 * (chunk_count - capacity) == 12 * lru(moments, capacity)
    assert waited == (0 if depth else fetched)


@pytest.mark.parametrize(("chunk_count", "capacity"), [(3, 2), (10, 3), (10, 9), (13, 7)])
def test_a_cycle_takes_turns_in_what_it_keeps_where_lru_would_keep_nothing(chunk_count: int, capacity: int) -> None:
    moments = [[c] for c in range(chunk_count)]
    fetched, _ = steady(moments, capacity, 0, cycles=2 * (chunk_count - 1))
    assert fetched == chunk_count * (chunk_count - capacity)  # of chunk_count - 1 cycles
    assert lru(moments, capacity) == chunk_count


def test_a_cycle_that_nearly_fits_keeps_less_so_that_nothing_has_to_wait() -> None:
    moments = [[c] for c in range(10)]
    fetched, waited = steady(moments, 9, 2, cycles=18)
    assert waited == 0 and fetched <= 9 * 3
    assert steady(moments, 9, 0, cycles=18) == (10, 10)


def test_recomputation_and_backward_share_one_fetch() -> None:
    forward = [[c] for c in range(20)]
    moments = [*forward, *([c] for i in reversed(range(0, 20, 2)) for c in (i, i + 1, i + 1, i))]
    fetched, waited = steady(moments, 5, 2)
    assert fetched == 12 * 2 * (20 - 5) and waited == 0


def test_the_next_chunks_are_prefetched_while_an_outer_unit_is_in_use() -> None:
    fetched, waited = steady([[0, c] for c in range(1, 6)], 3, 1)
    assert fetched and not waited


def test_what_the_optimizer_step_loses_is_fetched_again_and_not_kept_for_later() -> None:
    moments = [[c] for c in (*range(8), *reversed(range(8)))]
    nbytes = dict.fromkeys(range(8), 1)
    planner = Planner(trace_of(moments), nbytes, 4, 2, lost=range(8))
    played = play(planner, nbytes, 4, 2, 6, lost=range(8))
    assert played.fetched[2:] == [8 + 4] * 4 == belady(moments, 4, 6, lost=range(8))[2:]
    assert played.waited[2:] == [0] * 4
    assert planner.plan().between.prefetch == (0, 1)


def test_a_cycle_begins_with_what_another_cycle_left() -> None:
    moments = [[c] for c in range(6)]
    planner = Planner(trace_of(moments), dict.fromkeys(range(9), 1), 3, 0)
    plan = planner.plan([8, 7, 0])
    assert plan.actions[0] == Actions() and plan.actions[1].fetch == (1,)
    assert set(plan.actions[1].evict) <= {7, 8}


def test_a_large_chunk_does_not_drive_out_small_ones_in_vain() -> None:
    # 1 is needed last, but evicting it is not enough for 3, and evicting 2 alone is.
    nbytes = {1: 1, 2: 4, 3: 4}
    planner = Planner(trace_of([[2], [3], [2], [1]]), nbytes, 5, 0)
    plan = planner.plan(planner.plan().end)
    assert not any(1 in actions.fetch for actions in plan.actions)


def test_a_moment_too_large_for_the_device_names_its_unit() -> None:
    with pytest.raises(ValueError, match="unit 1 needs 7 bytes of full copies at once, capacity is 6"):
        Planner(trace_of([[0], [0, 1]]), {0: 3, 1: 4}, 6, 2)


def test_no_moments_and_no_chunks_make_an_empty_plan() -> None:
    assert Planner(trace_of([]), {}, 0, 2).plan([3]) == Plan(trace_of([]), (), Actions(), frozenset())
    assert Planner(trace_of([[], [7]]), {}, 0, 2).plan().actions == (Actions(), Actions())


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["palindrome", "two chunks", "nested", "random"])
def test_a_trace_of_thousands_of_moments_is_planned_soon(kind: str) -> None:
    n = 500
    forward = {
        "palindrome": [[c] for c in range(n) for _ in range(2)],
        "two chunks": [[0], [1]] * n,
        "nested": [[c // 100, 100 + c // 10, c] for c in range(200, n)] * 3,
        "random": [[(i * i * 7919 + i) % n] for i in range(2 * n)],
    }[kind]
    nbytes = dict.fromkeys(range(n), 1)
    planner = Planner(trace_of(forward + forward[::-1]), nbytes, n // 2, 4)
    play(planner, nbytes, n // 2, 4, 3)


# -- the trace


def test_a_trace_says_in_which_order_chunks_are_first_used() -> None:
    assert trace_of([[3, 1], [2], [1]]).first_uses() == (1, 3, 2)


# -- what a plan needs at least


def test_a_plan_tells_the_most_that_one_moment_needs_but_for_units_that_are_aside() -> None:
    trace, nbytes = trace_of([[0], [1, 2], [0, 1, 2], [2]]), {0: 4, 1: 2, 2: 1}
    assert Planner(trace, nbytes, 8, 1).least_bytes == 7
    assert Planner(trace, nbytes, 8, 1, aside={2}).least_bytes == 4
    assert Planner(trace, nbytes, 8, 1, aside=range(4)).least_bytes == 0


def test_moments_are_unplanned_until_a_plan_begins_with_them() -> None:
    cycle, moments = Cycle(), trace_of([[0], [1], [2]]).moments
    back = Moment(0, Phase.BACKWARD, frozenset([2]))

    def restart() -> None:
        cycle.restart(True, lambda trace: Planner(trace, dict.fromkeys(range(3), 1), 2, 1), ())

    restart()
    for moment in (*moments, back):
        cycle.advance(moment)
    assert cycle.unplanned() == (*moments, back)
    restart()
    assert cycle.unplanned() == ()
    for moment in moments[:2]:
        cycle.advance(moment)
        assert cycle.unplanned() == ()
    cycle.advance(back)
    assert cycle.unplanned() == (*moments[:2], back)
