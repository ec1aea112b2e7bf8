"""A part of a benchmark as a process that may fail, or take too long: what it has answered until then is kept."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 30


def run_part(command: Sequence[str | Path], log: Path, seconds: float) -> list[dict[str, Any]]:
    """Its answers, one for each line of JSON that it printed; the last tells an ``error`` if it did not end well."""
    out, ended = run_process(command, log, seconds)
    answers = []
    for line in out.splitlines():
        try:
            answers.append(json.loads(line))
        except ValueError:
            continue  # a line that was cut off, or a library's
    if ended is not None and not any("error" in answer for answer in answers):
        answers.append({"error": ended})
    return answers


def run_process(command: Sequence[str | Path], log: Path, seconds: float) -> tuple[str, str | None]:
    """What it has printed, and why it did not end well; its whole group ends with it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w+") as errors, log.with_suffix(".out").open("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also its children, such as those of a test
            except ProcessLookupError:
                pass
            process.wait(END_SECONDS)
        out.seek(0)
        text = out.read()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
    log.with_suffix(".out").unlink()
    if code is None:
        return text, f"took longer than {seconds:.0f} s"
    return text, None if code == 0 else f"ended with {code}: {last[:300]}"
