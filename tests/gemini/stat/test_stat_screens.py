"""The screens as a terminal shows them: pexpect runs the command, pyte is the terminal."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
from ranked_runs import close, open_ranks
from stat_runs import PREDICTION, RUN_ID, make_run, open_run, stats

from gemini.stat.cli import main

WAIT_SECONDS = 30.0


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


class Terminal:
    """A terminal of a given size that runs gemini-stat."""

    def __init__(self, *arguments: str, columns: int = 120, lines: int = 40, **environment: str) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = ""
        self._stream = pyte.Stream(self.screen)
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "gemini.stat", *arguments],
            dimensions=(lines, columns),
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1", **environment},
            encoding="utf-8",
            timeout=WAIT_SECONDS,
        )

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def wait_for(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """Feed the screen until ``condition`` holds of its lines."""
        end = time.monotonic() + WAIT_SECONDS
        while not condition(self.lines):
            assert time.monotonic() < end, "\n".join(self.lines)
            try:
                text = self.child.read_nonblocking(1 << 16, timeout=0.5)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(self.lines), "\n".join(self.lines)
                break
            self.raw += text
            self._stream.feed(text)
        return self.lines

    def shows(self, text: str) -> list[str]:
        return self.wait_for(lambda lines: any(text in line for line in lines))

    def close(self) -> int:
        self.child.expect(pexpect.EOF)
        self.raw += self.child.before or ""
        self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -(self.child.signalstatus or 0)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A run in this very process, which therefore looks alive from outside."""
    writer = open_run(**PREDICTION)
    assert writer.run_dir is not None
    yield writer.run_dir
    writer.close()


@pytest.mark.parametrize(("columns", "lines"), [(120, 40), (80, 24)])
def test_the_live_screen_fits_and_shows_every_part(live: Path, columns: int, lines: int) -> None:
    terminal = Terminal(str(live), columns=columns, lines=lines)
    shown = terminal.wait_for(lambda lines: "q quit" in lines[-1] and any("step 12" in line for line in lines))
    text = "\n".join(shown)
    for expected in (
        "RUNNING", "device", "20.0 GiB", "24.0 GiB", "host", "disk", "^forward", "^backward", "forward of ln_f",
        "DDDDDDDDHHHH>*hhhh", "disk > host", "advice", "resident 410", "host_memory",
        "device: predicted 20.0 GiB, measured 21.0 GiB (+5%)",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(shown) == lines
    assert max(map(len, shown)) <= columns
    terminal.child.send("q")
    assert terminal.close() == 0
    assert terminal.raw.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in terminal.raw  # the screen is given back


def test_keys_change_what_is_shown(live: Path) -> None:
    terminal = Terminal("top", str(live))
    terminal.shows("^forward")
    terminal.child.send("t")
    terminal.wait_for(lambda lines: not any("^forward" in line for line in lines))
    terminal.child.send("?")
    terminal.shows("leave; the run goes on")
    terminal.child.send("x")
    terminal.shows("by tier")
    terminal.child.send("p")
    terminal.shows("PAUSED")
    terminal.child.sendintr()
    assert terminal.close() == 130


def test_new_steps_appear_and_an_end_is_shown(tmp_path: Path) -> None:
    writer = open_run()
    terminal = Terminal("top", str(writer.run_dir), "-d", "0.2")
    terminal.shows("step 12")
    writer.record_step(stats(13))
    terminal.shows("step 13")
    writer.close("crashed")
    terminal.shows("CRASHED")
    terminal.child.send("q")
    assert terminal.close() == 5


def test_the_terminal_may_change_its_size(live: Path) -> None:
    terminal = Terminal("top", str(live), "-d", "0.2")
    terminal.wait_for(lambda lines: "q quit" in lines[39])
    terminal.child.setwinsize(24, 80)
    terminal.screen.resize(24, 80)
    terminal.wait_for(lambda lines: "q quit" in lines[23] and max(map(len, lines)) <= 80)
    terminal.child.kill(signal.SIGTERM)
    assert terminal.close() == 143


def test_a_terminal_that_wants_no_colour_gets_none(live: Path) -> None:
    terminal = Terminal("top", str(live), NO_COLOR="1")
    terminal.shows("^forward")
    terminal.child.send("q")
    terminal.close()
    assert "\x1b[3" not in terminal.raw.replace("\x1b[3J", "")
    assert "\x1b[1;3" not in terminal.raw


def test_ascii_has_no_other_characters(live: Path) -> None:
    terminal = Terminal("top", str(live), "--ascii")
    assert "\n".join(terminal.shows("^forward")).isascii()
    terminal.child.send("q")
    terminal.close()


def test_before_the_first_step_the_screen_says_what_it_waits_for() -> None:
    writer = open_run(steps=0)
    terminal = Terminal("top", str(writer.run_dir))
    terminal.shows("warm-up: the first step records the timeline")
    terminal.child.send("q")
    assert terminal.close() == 0
    writer.close()


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_one_screen_without_a_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["top", str(make_run()), "--once"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= width
    assert "by tier" in out


def test_parts_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run())
    assert main(["top", run, "--once", "--only", "tiers,chunks"]) == 0
    out = capsys.readouterr().out
    assert "by tier" in out
    assert "DDDDDDDD" in out
    assert "^forward" not in out
    assert main(["top", run, "--once", "--only", "tires"]) == 2
    assert "tires" in capsys.readouterr().err


def test_the_live_screen_compares_ranks_and_goes_through_them() -> None:
    columns, lines = 80, 24
    writers = open_ranks(3)
    terminal = Terminal(RUN_ID, "-d", "0.2", columns=columns, lines=lines)
    shown = terminal.wait_for(lambda lines: "q quit" in lines[-1] and any("straggler rank 2" in line for line in lines))
    assert any("over ranks" in line for line in shown)
    assert any("* 2 " in line for line in shown)
    assert len(shown) == lines and max(map(len, shown)) <= columns
    for expected in ("rank 0 of 3", "rank 1 of 3", "rank 2 of 3", " 3 ranks"):
        terminal.child.send("r")
        terminal.wait_for(lambda lines, expected=expected: expected in lines[0])  # type: ignore[misc]
    writers[1].close("crashed")
    terminal.shows("rank 1 crashed; ranks 0, 2 running")
    terminal.child.send("q")
    assert terminal.close() == 5
    close(writers)
