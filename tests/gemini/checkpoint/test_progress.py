"""Bars while files are saved and loaded: late, on terminals, and gone afterwards. With a clock that the test moves."""

import io
import threading

import pytest
import tqdm.std

from gemini.checkpoint.progress import Progress

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock.time)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return clock


def shown(stream: io.StringIO, clock: Clock, *times: float) -> str:
    """What work on two files of 2 GiB writes that is told of at these times."""
    with Progress("saving", 4 * GIB, stream) as progress:
        first, second = progress.part(2 * GIB), progress.part(2 * GIB)
        for tell, done, seconds in zip((first, first, second), (1, 2, 1), times, strict=True):
            clock.now = 100 + seconds
            tell(done * GIB)
    return stream.getvalue()


def test_work_under_two_seconds_shows_nothing(clock: Clock) -> None:
    assert shown(Terminal(), clock, 0.5, 1, 1.5) == ""


def test_longer_work_shows_bytes_and_rate_on_one_line_and_clears_it(clock: Clock) -> None:
    text = shown(Terminal(), clock, 1, 2, 3)
    *bars, last = text.split("\r")[1:]
    assert (
        "saving  75%" in bars[-2] and "3.00G of 4.00G" in bars[-2] and "B/s" in bars[-2] and "00:03 < 00:01" in bars[-2]
    )
    assert "\n" not in text
    assert (bars[-1].strip(), last) == ("", "")


def test_nothing_is_shown_where_there_is_no_terminal(clock: Clock) -> None:
    assert shown(io.StringIO(), clock, 1, 2, 30) == ""


def test_an_environment_variable_turns_it_off(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert shown(Terminal(), clock, 1, 2, 30) == ""


def test_another_thread_shows_nothing_and_no_thread_is_started(clock: Clock) -> None:
    before = threading.active_count()
    stream = Terminal()
    assert shown(stream, clock, 1, 2, 30) != ""
    assert threading.active_count() == before
    quiet = Terminal()
    thread = threading.Thread(target=shown, args=(quiet, clock, 1, 2, 30))
    thread.start()
    thread.join(30)
    assert quiet.getvalue() == ""


def test_an_error_clears_it_as_well(clock: Clock) -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress("loading", GIB, stream) as progress:
        tell = progress.part(GIB)
        clock.now += 5
        tell(GIB // 2)
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\r")
