"""One name for the run of several ranks, without asking anyone."""

import os
import time
from pathlib import Path


def shared_run_id(proc: Path = Path("/proc")) -> str | None:
    """The run id that all ranks which one ``torchrun`` started come to, also after a restart; None for a lone process.

    They share their parent: its process id and when it began name the run. Ranks on other machines have other parents;
    give them one folder (``telemetry=``, or the environment variable) to see them as one run.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return None
    parent = os.getppid()
    try:
        # After the last bracket: a program's name may hold blanks and brackets. Field 22 is the start in clock ticks.
        ticks = int((proc / str(parent) / "stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(int(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line[:6] == "btime ")
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    began = boot + ticks / os.sysconf("SC_CLK_TCK")
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began))}-{parent}"
