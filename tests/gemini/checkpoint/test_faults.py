"""A save that is killed, or refused by the disk, at any call leaves the old checkpoint or the new one, whole."""

import errno
from collections import Counter

import pytest
from forms import NEW, OLD, REFUSED, Prepared
from operations import Counted, Dead, Failing, Killed, intercepted

from gemini.errors import CheckpointError


def count(case: Prepared) -> int:
    """How many calls an undisturbed save makes."""
    case.begin()
    counted = Counted()
    with intercepted(case.work, counted):
        case.save()
    assert case.found() == NEW
    return len(counted.calls)


def test_killed_at_any_call(case: Prepared) -> None:
    outcomes: Counter[int] = Counter()
    for n in range(count(case)):
        case.begin()
        with pytest.raises(Dead), intercepted(case.work, Killed(n)):
            case.save()
        outcomes[case.found()] += 1
        if n % 4 == 0:
            case.check_later_saves()
    assert outcomes[OLD] and outcomes[NEW], outcomes
    assert bool(outcomes[REFUSED]) == case.form.is_pair, outcomes


NEW_IS_THERE = ("holds the new checkpoint, which loads", "is whole, but the disk did not confirm it")
_ONCE = [pytest.param(errno.EIO, False, id="a failing call")]
_REST = [
    pytest.param(
        error, stays, id=f"{errno.errorcode[error]} {'for ever' if stays else 'once'}", marks=pytest.mark.heavy
    )
    for error in (errno.EIO, errno.ENOSPC, errno.EROFS)
    for stays in (False, True)
    if stays or error != errno.EIO
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("error", "stays"), _ONCE + _REST)
def test_refused_at_any_call(case: Prepared, error: int, stays: bool) -> None:
    outcomes: Counter[int] = Counter()
    for n in range(count(case)):
        case.begin()
        message = ""
        with intercepted(case.work, Failing(n, error, stays=stays)):
            try:
                case.save()
            except CheckpointError as fault:
                message = str(fault)
        found = case.found()
        outcomes[found] += 1
        if not message:
            assert found == NEW, n
        elif not case.form.is_pair:
            is_new = any(words in message for words in NEW_IS_THERE)
            assert found == (NEW if is_new else OLD), (n, message)
        if n % 4 == 0:
            case.check_later_saves()
    assert outcomes[OLD], outcomes
