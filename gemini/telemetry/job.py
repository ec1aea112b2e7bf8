"""Which processes train together, and a name for their run, without asking any of them."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The processes that one launcher started to train together, and which of them this is."""

    rank: int = 0
    world_size: int = 1
    restart: int = 0
    """How often the launcher on this machine has started them anew; on another machine it may be another number."""
    run_id: str | None = None
    """What they call their run; None: each process has a run of its own."""
    attempt: str = ""
    """What they call this start of theirs, to tell it from one before a restart."""


def find_job(environ: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> Job:
    """The job as ``torchrun`` or Slurm's ``srun`` describe it to the processes that they start.

    Processes that one ``torchrun`` started share their parent: its process id and when it began name the run, also
    after a restart. Those on another machine have another parent, so theirs is another name, on which a process group
    has to agree (see `gemini.monitor.job`). A step of Slurm has one number on all machines.
    """
    is_torchrun = "TORCHELASTIC_RUN_ID" in environ
    # srun alone sets this; a batch script has a SLURM_PROCID, too, and is one process.
    tasks = _whole(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_ID" in environ else 0
    world_size = _whole(environ, "WORLD_SIZE", 1 if is_torchrun or "RANK" in environ else tasks or 1)
    rank = _whole(environ, "RANK", _whole(environ, "SLURM_PROCID") if tasks else 0)
    restart = _whole(environ, "TORCHELASTIC_RESTART_COUNT" if is_torchrun else "SLURM_RESTART_COUNT")
    run_id = None
    if world_size > 1 and is_torchrun:
        run_id = _name_of_parent(proc)
    elif world_size > 1 and world_size == tasks:
        run_id = _name_of_step(environ)
    return Job(rank=rank, world_size=world_size, restart=restart, run_id=run_id, attempt=str(restart))


def run_name(began: float, *numbers: int) -> str:
    """The id of a run that began at this time (seconds since the epoch); ids in order are runs in order."""
    return "-".join((time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(began)), *map(str, numbers)))


def _name_of_parent(proc: Path) -> str | None:
    parent = os.getppid()
    try:
        # After the last bracket: a program's name may hold blanks and brackets. Field 22 is the start in clock ticks.
        ticks = int((proc / str(parent) / "stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(int(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line[:6] == "btime ")
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return run_name(boot + ticks / os.sysconf("SC_CLK_TCK"), parent)


def _name_of_step(environ: Mapping[str, str]) -> str | None:
    began = _whole(environ, "SLURM_JOB_START_TIME")  # older versions of Slurm do not tell it
    job, step = _whole(environ, "SLURM_JOB_ID"), _whole(environ, "SLURM_STEP_ID")
    return run_name(began, job, step) if began and job else None


def _whole(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 16 else default
