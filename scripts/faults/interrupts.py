"""Ctrl-C at any moment of training, caught by a user who trains on.

    python scripts/faults interrupts [--signals 2000] [--lines N [--twice]]

A signal comes after a random time (``--signals``, over all placements and phases), or before a line of our code runs
(``--lines N``: N lines, evenly spread, in each placement and phase; 0 takes all; ``--twice``: and again a few lines
later). What counts as broken: a hang, an error that is not the interrupt's own, other numbers than plain PyTorch's from
then on, a checkpoint that is neither the old one nor the new one. A step is taken whole or not at all.
"""

import argparse
import faulthandler
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from interrupting import (
    PHASES,
    AfterSeconds,
    AtLine,
    Interrupt,
    Interrupted,
    Twice,
    lines_of,
    outcome_of,
    random_delays,
)
from loop import PLACEMENTS

HANG_SECONDS = 60.0
LINES_BETWEEN = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "offload": {"activation_policy": "offload"},
    "recompute": {"activation_policy": "recompute"},
    "in backward": {"update_in_backward": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--signals", type=int, default=2000, help="how many, over all placements and phases")
    parser.add_argument("--lines", type=int, metavar="N", help="interrupt before N lines of each phase instead")
    parser.add_argument("--twice", action="store_true", help="with --lines: and again some lines later")
    parser.add_argument("--variant", choices=VARIANTS, default="plain", help="options of the plugin")
    parser.add_argument("--placement", choices=PLACEMENTS, help="only this one")
    parser.add_argument("--phase", choices=PHASES, help="only this one")


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    cells = [
        (placement, phase)
        for placement in PLACEMENTS
        for phase in PHASES
        if options.placement in (None, placement) and options.phase in (None, phase)
        if options.variant != "offload" or placement == "disk"  # elsewhere there is nowhere to go
    ]
    found: dict[str, Any] = {}
    for number, (placement, phase) in enumerate(cells):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            cell = _Cell(placement, phase, Path(folder), VARIANTS[options.variant])
            if options.lines is None:
                share = options.signals // len(cells) + (number < options.signals % len(cells))
                cell.interrupt_at_random(share, seed=number)
            else:
                cell.interrupt_before_lines(options.lines, options.twice)
            os.chdir("/")
        found[f"{placement}, {phase}"] = {**cell.outcomes}
        print(f"{placement}, {phase}: {dict(cell.outcomes)}", flush=True)
    broken = sum(count for outcomes in found.values() for text, count in outcomes.items() if "wrong" in text)
    return {"interrupts": sum(map(_came, found.values())), "broken": broken, "outcomes": found, "ok": not broken}


class _Cell:
    """One phase in one placement."""

    def __init__(self, placement: str, phase: str, folder: Path, plugin: Mapping[str, Any]) -> None:
        self.outcomes: Counter[str] = Counter()
        self._placement = placement
        self._phase = phase
        self._folder = folder
        self._plugin = plugin
        self._run = self._begin()

    def _begin(self) -> Interrupted:
        return Interrupted(self._placement, self._folder, **self._plugin)

    def interrupt_at_random(self, count: int, seed: int) -> None:
        """So many interrupts; those that come too late to meet the phase are sent again."""
        outcome_of(self._run, self._phase, Interrupt())
        delays = random_delays(seed, 1.1 * self._run.seconds[self._phase])
        while _came(self.outcomes) < count:
            self._interrupt(AfterSeconds(next(delays)))

    def interrupt_before_lines(self, count: int, twice: bool) -> None:
        """Interrupt before the first and the last time that a line runs, ``count`` times in all; 0 takes every line."""
        places = lines_of(self._run, self._phase)
        moments = [(place, nth) for place, times in places for nth in sorted({1, times})]
        for number, (place, nth) in enumerate(moments[:: max(1, len(moments) // count) if count else 1]):
            between = LINES_BETWEEN[number % len(LINES_BETWEEN)]
            self._interrupt(Twice(place, nth, between) if twice else AtLine(place, nth))

    def _interrupt(self, interrupt: Interrupt) -> None:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        outcome = outcome_of(self._run, self._phase, interrupt)
        faulthandler.cancel_dump_traceback_later()
        if "wrong" in outcome:
            outcome += f" (interrupted {interrupt})"
        self.outcomes[outcome] += 1
        if "wrong" in outcome or "torn" in outcome:
            self._run = self._begin()


def _came(outcomes: Any) -> int:
    return sum(count for text, count in outcomes.items() if text != "no interrupt")
