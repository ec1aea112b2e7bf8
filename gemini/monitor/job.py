"""The job that trains a boosted model, as its process group knows it."""

import logging
import os
import time
from dataclasses import replace

from torch import distributed

from ..telemetry.job import Job, find_job, run_name
from ..torch_private import default_store

logger = logging.getLogger(__name__)

_KEY = "gemini_memory/run"


def this_job() -> Job:
    """Rank and world size of the process group, and the names that its ranks have for their run and this start of it.

    Without a process group the launcher's word counts.
    """
    launched = find_job()
    if not (distributed.is_available() and distributed.is_initialized()):
        return launched
    job = replace(launched, rank=distributed.get_rank(), world_size=distributed.get_world_size())
    if job.world_size == 1:
        return replace(job, run_id=None)
    this_start = run_name(time.time(), os.getpid())
    run_id, attempt = _agreed(f"{job.run_id or this_start} {this_start}").split()
    return replace(job, run_id=run_id, attempt=attempt)


def _agreed(proposal: str) -> str:
    """The first proposal that a rank has made: an answer of the group's store, for which no rank waits for another.

    Each start of a job has a store of its own, or a part of one.
    """
    try:
        return str(default_store().compare_set(_KEY, "", proposal).decode())
    except Exception as error:  # telemetry is no reason to fail
        logger.warning("the ranks have no common run in gemini-stat, their process group's store failed: %s", error)
        return proposal
