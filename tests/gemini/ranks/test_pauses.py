"""Which ranks run no backward for now, and whose gradients of a later generation are worth nothing."""

from gemini.ranks.pauses import Pauses
from gemini.ranks.rounds import FOREVER


def test_what_comes_before_a_vote_that_we_wait_for_is_worth_nothing_and_what_comes_after_it_counts() -> None:
    pauses = Pauses(0)
    assert not pauses.dooms(1)
    pauses.begin_own(4)
    assert pauses.dooms(1)
    pauses.begin(1, 4)  # it has come to the vote, and may have seen how it ends before us
    assert not pauses.dooms(1)
    pauses.end(7)
    assert not pauses.dooms(1) and pauses.take_generation() == 7 and pauses.take_generation() is None


def test_a_rank_pauses_until_its_vote_is_over_or_for_ever() -> None:
    pauses = Pauses(0)
    pauses.begin(1, 4)
    pauses.begin(2, FOREVER)
    assert pauses.ranks() == [1, 2]
    pauses.begin_own(4)
    pauses.end()
    assert pauses.ranks() == [2]


def test_a_rank_that_has_ended_takes_everything() -> None:
    pauses = Pauses(0)
    pauses.begin(0, FOREVER)
    pauses.begin(1, 9)
    assert pauses.dooms(1) and pauses.ranks() == [0, 1]
