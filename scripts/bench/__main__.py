"""Benchmarks: each compares in one run, side by side.

    python scripts/bench adam     one Adam step: our kernel, torch's, those of DeepSpeed and ColossalAI
    python scripts/bench optimizers   one step of SGD, Adagrad and others on chunks against their own
    python scripts/bench capacity   a GPT under a cap on RAM: does it train, how fast, and how large can it be
    python scripts/bench checkpoint   saving and loading against safetensors and torch
    python scripts/bench quantised   from quantised weights to full copies, beside bitsandbytes
    python scripts/bench tiny     one Adam step of many small tensors, ours and torch's
    python scripts/bench step     one training step, managed against plain PyTorch
    python scripts/bench peer_steps   the same against FSDP2 and DeepSpeed, each in a process of its own
    python scripts/bench offload_step   with model data in RAM or on a disk: ours, plain, FSDP2, DeepSpeed's NVMe
    python scripts/bench timeline   a step that the disk bounds, phase by phase, beside its bounds and others
    python scripts/bench estimate   what gemini-stat estimate says of such a step, part by part, over what it takes
    python scripts/bench placement   which homes RAM should have: steps simulated, nothing is trained
    python scripts/bench ranks    training steps of several ranks, beside FSDP2 and DeepSpeed
    python scripts/bench saving   saving on several ranks, beside FSDP2 with torch.distributed.checkpoint
    python scripts/bench activations | async_save | disk | overhead | overlap | telemetry     see their own --help

A benchmark is a module with ``add_arguments(parser)`` and ``run(arguments) -> dict``; the dict goes to ``--json FILE``.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import report

NAMES = (
    *(
        "adam",
        "capacity",
        "checkpoint",
        "estimate",
        "offload_step",
        "optimizers",
        "peer_steps",
        "placement",
        "quantised",
        "ranks",
        "saving",
    ),
    *("step", "timeline", "tiny"),
)
SCRIPTS = ("activations", "async_save", "disk", "overhead", "overlap", "telemetry")
"""Have a `main` that reads the command line itself."""


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        name = sys.argv.pop(1)
        sys.exit(importlib.import_module(name).main())
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(name) for name in NAMES}
    for name, module in modules.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    arguments = parser.parse_args()
    result = {"benchmark": arguments.name, "machine": report.machine(), **modules[arguments.name].run(arguments)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result.get("ok", True) else 1)


if __name__ == "__main__":
    main()
