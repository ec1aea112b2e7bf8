"""What the job tells people: sections like those of ``gemini-stat``, a progress bar on a terminal, lines elsewhere."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

_LINE_SECONDS = 30.0
_LABEL_WIDTH = 11


class Report:
    """Prints to one stream, with colour on a terminal only.

    Parameters
    ----------
    file
        stdout, or stderr when stdout is kept for JSON.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        wanted = file.isatty() and not os.environ.get("NO_COLOR")
        self._console = Console(
            file=file, markup=False, highlight=False, emoji=False, color_system="auto" if wanted else None
        )

    def heading(self, title: str) -> None:
        line = "-" if self._console.options.ascii_only else "─"
        self._print(Rule(Text(f" {title}", style="bold"), align="left", style="dim", characters=line))

    def title(self, name: str, *facts: str) -> None:
        self._print(Text.assemble(" ", (name, "bold"), *((f"  {fact}", "cyan") for fact in facts)))

    def rows(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Label, value, and what it means."""
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True, min_width=_LABEL_WIDTH)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(overflow="fold")
        for label, value, meaning in rows:
            table.add_row(Text(f" {label}", style="dim"), Text(value, style="bold"), meaning)
        self._print(table)

    def facts(self, rows: Sequence[tuple[str, str | Text]]) -> None:
        """Label and a sentence."""
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True, min_width=_LABEL_WIDTH)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(Text(f" {label}", style="dim"), text)
        self._print(table)

    def line(self, text: str | Text, style: str = "") -> None:
        self._print(Text.assemble(" ", (text, style) if isinstance(text, str) else text))

    def working(self, what: str) -> AbstractContextManager[Any]:
        """Say on a terminal what takes a while, and take it back when it is over."""
        return self._console.status(what) if self._file.isatty() else nullcontext()

    def _print(self, renderable: RenderableType) -> None:
        with self._console.capture() as capture:
            self._console.print(renderable)
        for line in capture.get().splitlines():
            print(line.rstrip(" "), file=self._file)  # rich fills columns to the edge, which a file should not see
        self._file.flush()


class Progress:
    """A bar on stderr where that is a terminal, else a line every tenth of the way or half minute."""

    def __init__(self, report: Report, done: int, total: int, tokens_per_step: int) -> None:
        self._report = report
        self._begin = self._last_line = time.monotonic()
        self._first_step_end: float | None = None
        self._done = self._start = done
        self._total = total
        self._tokens = tokens_per_step
        self._bar = tqdm(
            initial=done,
            total=total,
            disable=True if os.environ.get("TQDM_DISABLE") else None,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format=" step {n_fmt}/{total_fmt} |{bar}| {postfix[0]}{elapsed} < {remaining} ",
            postfix=[""],
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._begin
        self._bar.close()

    @property
    def steps(self) -> int:
        return self._done - self._start

    def tokens_per_second(self, until: float | None = None) -> float:
        """Without the first step, which records and compiles, unless it is the only one."""
        until = until if until is not None else time.monotonic()
        if self._first_step_end is not None and self.steps > 1:
            return (self.steps - 1) * self._tokens / max(1e-9, until - self._first_step_end)
        return self.steps * self._tokens / max(1e-9, until - self._begin)

    def update(self, loss: float) -> None:
        """One more step is done."""
        self._done += 1
        if self._first_step_end is None:
            self._first_step_end = time.monotonic()
        speed = f"{self.tokens_per_second():,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.postfix[0] = f"loss {loss:.3f}  {speed}  "
            self._bar.update()
        elif self._line_is_due():
            self._last_line = time.monotonic()
            width = len(str(self._total))
            elapsed = self._last_line - self._begin
            self._report.line(f"step {self._done:>{width}}/{self._total}   loss {loss:.3f}   {speed}   {elapsed:.0f} s")

    def _line_is_due(self) -> bool:
        tenth = self._done * 10 // self._total > (self._done - 1) * 10 // self._total
        ends = self._done in (self._start + 1, self._total)
        return tenth or ends or time.monotonic() - self._last_line >= _LINE_SECONDS
