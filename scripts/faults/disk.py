"""Each operation on the disk of one step (or boost, or a first step) fails once, is short, is late, or spoils the data.

By default every one of them, for all settings, which takes some hours of one core; ``--setting``, ``--site`` and
``--what`` (each may be given several times) and ``--every`` choose.
"""

import argparse
from typing import Any

from fault_runs import run_all
from fault_sites import DISK
from faulty_steps import SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--site", action="append", choices=list(DISK))
    parser.add_argument("--what", action="append", choices=["step", "first step", "boost"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th operation")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return run_all(
        arguments.setting or [name for name in SETTINGS if not name.startswith(("resident", "streamed"))],
        arguments.site or DISK,
        arguments.what or ["step", "first step", "boost"],
        arguments.every,
    )
