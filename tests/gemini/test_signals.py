"""Signals wait for the end of a section of ours, and reach the user's handlers everywhere else."""

import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from gemini import signals
from gemini.signals import uninterrupted

NUMBER = signal.SIGUSR1


@pytest.fixture
def came() -> Iterator[list[str]]:
    """What a handler of the user's was called for."""
    calls: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        calls.append(signal.Signals(number).name)

    before = signal.signal(NUMBER, handle)
    yield calls
    signal.signal(NUMBER, before)


def test_a_signal_is_held_until_the_outermost_section_ends(came: list[str]) -> None:
    handler = signal.getsignal(NUMBER)
    with uninterrupted:
        with uninterrupted:
            signal.raise_signal(NUMBER)
            signal.raise_signal(NUMBER)
        assert came == []
    assert came == ["SIGUSR1"] and signal.getsignal(NUMBER) is handler


def test_what_a_held_signal_raises_comes_out_of_the_section() -> None:
    def late() -> None:
        done.append("before")
        signal.raise_signal(signal.SIGINT)
        done.append("after")

    done: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            uninterrupted(late)()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["before", "after"]


@pytest.mark.parametrize("function", ["__exit__", "_raise_held"])
def test_one_that_comes_while_another_is_raised_is_not_raised_again_later(function: str) -> None:
    """Ctrl-C twice: the second would have come out of whatever the program does when it has caught the first."""

    def trace(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_name == function and frame.f_code.co_filename == signals.__file__:
            if event == "line" and not uninterrupted._sections:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
            return trace
        return None

    before, tracing = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt):
            with uninterrupted:
                signal.raise_signal(signal.SIGINT)
                sys.settrace(trace)  # type: ignore[arg-type]
        assert sys.gettrace() is None
        try:
            with uninterrupted:
                pass
        except KeyboardInterrupt:
            pytest.fail("raised again")
    finally:
        sys.settrace(tracing)
        signal.signal(signal.SIGINT, before)


def test_an_error_of_the_section_is_the_context_of_what_the_signal_raises() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            with uninterrupted:
                signal.raise_signal(signal.SIGINT)
                raise ValueError("on purpose")
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(caught.value.__context__, ValueError)


def test_between_the_sections_of_a_watched_part_signals_come_at_once(came: list[str]) -> None:
    handler = signal.getsignal(NUMBER)
    with uninterrupted.watched():
        with uninterrupted:
            signal.raise_signal(NUMBER)
            assert came == []
        assert came == ["SIGUSR1"]
        signal.raise_signal(NUMBER)
        assert came == ["SIGUSR1"] * 2
    assert signal.getsignal(NUMBER) is handler


def test_a_handler_that_the_user_sets_meanwhile_stays(came: list[str]) -> None:
    def other(number: int, frame: FrameType | None) -> None:
        came.append("other")

    with uninterrupted.watched():
        former = signal.signal(NUMBER, other)
    signal.raise_signal(NUMBER)
    assert came == ["other"]
    signal.signal(NUMBER, former)  # ours, which was there then: it still leads to the user's
    signal.raise_signal(NUMBER)
    assert came == ["other", "SIGUSR1"]


def test_who_asks_again_after_a_while_is_heard_at_once(came: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with uninterrupted:
        signal.raise_signal(NUMBER)
        signal.raise_signal(NUMBER)
        assert came == []
        monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
        signal.raise_signal(NUMBER)
        assert came == ["SIGUSR1"]
    assert came == ["SIGUSR1"]


def test_a_handler_that_raises_while_a_section_begins_leaves_everything_as_it_was(
    came: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(number: int, handler: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(signals._signal, "signal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            uninterrupted.__enter__()
    signal.raise_signal(NUMBER)
    assert came == ["SIGUSR1"]
    with uninterrupted:
        signal.raise_signal(NUMBER)
        assert came == ["SIGUSR1"]


def test_a_long_section_lets_signals_in_where_it_says_so(came: list[str]) -> None:
    with uninterrupted:
        uninterrupted.let_in()
        signal.raise_signal(NUMBER)
        assert came == []
        uninterrupted.let_in()
        assert came == ["SIGUSR1"]
    assert came == ["SIGUSR1"]


def test_other_threads_have_no_part_in_it(came: list[str]) -> None:
    handler, found = signal.getsignal(NUMBER), []

    def enter() -> None:
        with uninterrupted.watched(), uninterrupted:
            found.append(signal.getsignal(NUMBER))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(30)
    assert found == [handler]


def test_signals_without_a_handler_in_python_are_left_alone() -> None:
    before = signal.signal(NUMBER, signal.SIG_IGN)
    try:
        with uninterrupted:
            assert signal.getsignal(NUMBER) is signal.SIG_IGN
            signal.raise_signal(NUMBER)
    finally:
        signal.signal(NUMBER, before)
