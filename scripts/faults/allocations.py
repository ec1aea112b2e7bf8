"""Each allocation, thread and file that one step (or boost, or a first step) asks the system for is refused once.

By default every one of them, for all settings, which takes some hours of one core; ``--setting``, ``--site`` and
``--what`` (each may be given several times) and ``--every`` choose. ``--site interpreter --what step`` has each
allocation of Python itself fail, some ten thousand in a step; with ``--every 97``, say.
"""

import argparse
from typing import Any

from fault_runs import run_all
from fault_sites import ALLOCATIONS
from faulty_steps import SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--site", action="append", choices=list(ALLOCATIONS))
    parser.add_argument("--what", action="append", choices=["step", "first step", "boost"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th operation")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    sites = arguments.site or [site for site in ALLOCATIONS if site != "interpreter"]
    whats = arguments.what or ["step", "first step", "boost"]
    return run_all(arguments.setting or SETTINGS, sites, whats, arguments.every)
