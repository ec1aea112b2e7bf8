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
    """Rank and world size of the process group, and the name that all its ranks know their run by.

    Without a process group the launcher's word counts.
    """
    launched = find_job()
    if not (distributed.is_available() and distributed.is_initialized()):
        return launched
    job = replace(launched, rank=distributed.get_rank(), world_size=distributed.get_world_size())
    if job.world_size == 1:
        return replace(job, run_id=None)
    return replace(job, run_id=_agreed(job.run_id or run_name(time.time(), os.getpid())))


def _agreed(proposal: str) -> str:
    """The first proposal that a rank has made: an answer of the group's store, for which no rank waits for another."""
    try:
        return str(default_store().compare_set(_KEY, "", proposal).decode())
    except Exception as error:  # telemetry is no reason to fail
        logger.warning("the ranks have no common run in gemini-stat, their process group's store failed: %s", error)
        return proposal
