"""Ctrl-C at any line of a save or a load: files, model and optimizer are the old ones or the new ones, whole."""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from forms import FORMS, NEW, OLD, PARTS, Prepared, Subject, is_same, prepared, state_of
from operations import folder_in_memory

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]
EVERY = [pytest.param(61, id="some lines"), pytest.param(1, id="every line")]


class Lines:
    """Counts the lines of our checkpoints' code that run, and has SIGINT come before one of them."""

    def __init__(self, n: int | None = None) -> None:
        self.count = 0
        self._n = n

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if "gemini/checkpoint/" in frame.f_code.co_filename.replace("tests/", "") else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count - 1 == self._n:
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.fixture(scope="module", params=["sharded", "checkpoint that replaces one"])
def case(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    form = next(form for form in FORMS if form.name == request.param)
    with folder_in_memory() as folder, prepared(form, folder / "x") as it:
        yield it


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("every", EVERY)
def test_a_save_that_is_interrupted(case: Prepared, every: int) -> None:
    case.begin()
    lines = Lines()
    with lines.traced():
        case.save()
    outcomes: Counter[int] = Counter()
    for n in [*range(0, lines.count, every), lines.count - 1]:
        case.begin()
        with pytest.raises(KeyboardInterrupt), Lines(n).traced():
            case.save()
        outcomes[case.found()] += 1
        assert all(is_same(state_of(case.subject, part), case.subject.states[NEW][part]) for part in PARTS)
        if n % 4 == 0:
            case.check_later_saves()
    assert outcomes[OLD] and outcomes[NEW], outcomes


@pytest.mark.parametrize("every", EVERY)
def test_a_load_that_is_interrupted(case: Prepared, every: int) -> None:
    case.begin()
    case.save()
    target = Subject(case.form.build, seed=2)
    target.go_to(2)
    before = {part: state_of(target, part) for part in PARTS}
    lines = Lines()
    with lines.traced():
        case.form.load(target, case.work)
    outcomes: Counter[str] = Counter()
    for n in [*range(0, lines.count, every), lines.count - 1]:
        target = Subject(case.form.build, seed=2)
        target.go_to(2)
        with pytest.raises(KeyboardInterrupt), Lines(n).traced():
            case.form.load(target, case.work)
        now = {part: state_of(target, part) for part in PARTS}
        loaded = {**before, **{part: case.subject.states[NEW][part] for part in case.form.parts}}
        outcomes["as before" if is_same(now, before) else "loaded" if is_same(now, loaded) else "mixed"] += 1
    assert set(outcomes) == {"as before", "loaded"}, outcomes


def test_a_second_signal_interrupts_a_load_at_once(case: Prepared) -> None:
    case.begin()
    case.save()

    def twice(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gemini.checkpoint.match.Match.load", twice)
        case.form.load(case.subject.other, case.work)
