"""Who gets how much: from claims to grants, and when a holder follows them."""

from hypothesis import given
from hypothesis import strategies as st

from gemini.lease.sharing import Claim, share
from gemini.lease.steady import REST_SECONDS, UP_SECONDS, Steady

GIB = 1 << 30
sizes = st.integers(0, 1 << 40)
claims = st.builds(lambda floor, more: Claim(floor=floor, wish=floor + more), sizes, sizes)


def test_each_gets_its_wish_where_there_is_enough() -> None:
    assert share(10 * GIB, [Claim(floor=GIB, wish=6 * GIB), Claim(floor=0, wish=3 * GIB)]) == [6 * GIB, 3 * GIB]


def test_what_goes_beyond_the_floors_is_shared_by_wish() -> None:
    assert share(8 * GIB, [Claim(floor=2 * GIB, wish=8 * GIB), Claim(floor=0, wish=12 * GIB)]) == [4 * GIB, 4 * GIB]


def test_what_a_user_has_said_is_not_taken_away() -> None:
    said, other = Claim(floor=6 * GIB, wish=6 * GIB), Claim(floor=GIB, wish=20 * GIB)
    assert share(8 * GIB, [said, other]) == [6 * GIB, 2 * GIB]
    assert share(6 * GIB + 1, [other, said]) == [GIB, 5 * GIB + 1]


@given(st.integers(0, 1 << 42), st.lists(claims, max_size=6))
def test_grants_stay_within_the_total_and_between_floor_and_wish(total: int, asked: list[Claim]) -> None:
    grants = share(total, asked)
    assert sum(grants) <= total
    assert all(grant <= claim.wish for grant, claim in zip(grants, asked, strict=True))
    if sum(claim.floor for claim in asked) <= total:
        assert all(grant >= claim.floor for grant, claim in zip(grants, asked, strict=True))
    if sum(claim.wish for claim in asked) <= total:
        assert grants == [claim.wish for claim in asked]


@given(st.integers(0, 1 << 42), st.lists(claims, min_size=1, max_size=6), sizes)
def test_a_newcomer_never_raises_the_grant_of_another(total: int, asked: list[Claim], wish: int) -> None:
    before, after = share(total, asked), share(total, [*asked, Claim(floor=0, wish=wish)])
    assert all(now <= then for now, then in zip(after, before, strict=False))


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.lists(claims, max_size=6))
def test_less_memory_never_raises_a_grant(total: int, less: int, asked: list[Claim]) -> None:
    before, after = share(total, asked), share(max(0, total - less), asked)
    assert all(now <= then for now, then in zip(after, before, strict=True))


def test_a_smaller_grant_is_followed_at_once_and_a_larger_one_after_a_while() -> None:
    steady = Steady(4 * GIB).follow(2 * GIB, GIB, now=0.0)
    assert steady.held == 2 * GIB
    steady = steady.follow(4 * GIB, GIB, now=1.0)
    assert steady.held == 2 * GIB
    steady = steady.follow(4 * GIB, GIB, now=1.0 + UP_SECONDS)
    assert steady.held == 4 * GIB


def test_a_grant_that_wavers_is_not_followed() -> None:
    steady = Steady(4 * GIB)
    for moment in range(1000):
        steady = steady.follow(4 * GIB + (-1) ** moment * (100 << 20), GIB, now=float(moment))
        assert steady.held == 4 * GIB


def test_a_grant_that_is_large_for_moments_only_is_not_followed() -> None:
    steady = Steady(2 * GIB)
    for moment in range(100):
        steady = steady.follow(8 * GIB if moment % 2 else 2 * GIB, GIB, now=moment * UP_SECONDS / 2)
        assert steady.held == 2 * GIB


def test_pressure_takes_down_to_the_floor_and_nothing_grows_for_a_while() -> None:
    steady, held = Steady(4 * GIB), []
    for moment in range(20):
        steady = steady.follow(4 * GIB, GIB, now=float(moment), is_pressed=True)
        held.append(steady.held)
    assert held == sorted(held, reverse=True)
    assert held[0] < 4 * GIB
    assert held[-1] == GIB
    for moment in range(int(REST_SECONDS) - 1):
        steady = steady.follow(4 * GIB, GIB, now=20.0 + moment)
        assert steady.held == GIB
    for moment in range(10):
        steady = steady.follow(4 * GIB, GIB, now=20.0 + REST_SECONDS + moment)
    assert steady.held == 4 * GIB


def test_pressure_never_gives_more() -> None:
    assert Steady(GIB).follow(8 * GIB, 4 * GIB, now=0.0, is_pressed=True).held <= GIB
