"""Print how each use outside of forward compares with plain PyTorch, at each placement.

    PYTHONPATH=.:tests python tests/outside/report.py [--only PATTERN] [--placement NAME] [--wrong]

Uses run in a child process: one that crashes or hangs is reported as such, and the next ones go on in a new child.
The exit code is 1 if any use is not equal to plain PyTorch or refused as documented.
"""

import argparse
import collections
import json
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from outside.catalogue import USES, is_worth_a_run
from outside.harness import PLACEMENTS, Verdict

SECONDS = 60
"""After this long without an answer a use counts as hanging."""


class Child:
    """A process that runs one use after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child_uses.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def judge(self, name: str, placement: str) -> Verdict:
        """Have a use run. After ``CRASH`` or ``HANG`` this child is of no more use."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\t{placement}\n")
        self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=SECONDS)
        except queue.Empty:
            self.end()
            return Verdict("HANG", f"no answer in {SECONDS} s")
        if not answer:
            return Verdict("CRASH", f"the process ended with {self._process.wait()}")
        return Verdict(**json.loads(answer))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern of names")
    parser.add_argument("--placement", action="append", choices=PLACEMENTS, help="may be given several times")
    parser.add_argument("--wrong", action="store_true", help="show only what is neither equal nor refused")
    options = parser.parse_args()
    placements = options.placement or list(PLACEMENTS)
    names = [name for name in USES if re.search(options.only, name)]
    width = max(map(len, names), default=0)
    counts = {placement: collections.Counter[str]() for placement in placements}
    print(" " * width, *(f"{placement:8}" for placement in placements))
    child = Child()
    for name in names:
        verdicts = {}
        for placement in placements:
            if not is_worth_a_run(USES[name], PLACEMENTS[placement]):
                verdicts[placement] = Verdict("-")
                continue
            verdicts[placement] = verdict = child.judge(name, placement)
            counts[placement][verdict.kind] += 1
            if verdict.kind in ("CRASH", "HANG"):
                child = Child()
        if options.wrong and all(verdict.is_right or verdict.kind == "-" for verdict in verdicts.values()):
            continue
        print(f"{name:{width}}", *(f"{verdict.kind:8}" for verdict in verdicts.values()))
        for text in dict.fromkeys(v.text for v in verdicts.values() if v.text):
            where = [placement for placement, verdict in verdicts.items() if verdict.text == text]
            print(f"    {', '.join(where)}: {text[:300]}", flush=True)
    child.end()
    print()
    for placement, count in counts.items():
        print(f"{placement:8}", f"{count['equal'] + count['refused']} of {count.total()} right:", dict(count))
    return int(any(set(count) - {"equal", "refused"} for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
