"""Benchmarks: each compares in one run, side by side, and prints one table.

    python scripts/bench adam     one Adam step: our kernel, torch's, those of DeepSpeed and ColossalAI
    python scripts/bench lazy     models without memory against models built and copied
    python scripts/bench overhead   managed against unmanaged steps where everything fits
    python scripts/bench capacity   a GPT under a cap on RAM: does it train, how fast, and how large can it be
    python scripts/bench offload_step   with model data in RAM or on a disk: ours, plain, FSDP2, DeepSpeed's NVMe
    python scripts/bench activations   the longest sequence and the largest batch under a cap on RAM
    python scripts/bench checkpoint   saving and loading against safetensors and torch
    python scripts/bench ranks    training steps of several ranks, beside FSDP2 and DeepSpeed
    python scripts/bench lora     adapters of peft: plain, ours, with the base on a disk or quantised
    python scripts/bench gpu      all that a machine with a GPU is asked for; `scripts/gpu` is the same

    python scripts/bench async_save   steps while a checkpoint is written
    python scripts/bench disk     how fast a folder's disk is, in the ways in which it could be used
    python scripts/bench estimate   what gemini-stat estimate says of a step on a disk, part by part, over what it takes
    python scripts/bench optimizers   one step of SGD, Adagrad and others on chunks against their own
    python scripts/bench overlap   are the moves hidden?
    python scripts/bench peer_steps   a training step beside FSDP2 and DeepSpeed, each in a process of its own
    python scripts/bench placement   which homes RAM should have: steps simulated, nothing is trained
    python scripts/bench quantised   from quantised weights to full copies, beside bitsandbytes
    python scripts/bench saving   saving on several ranks, beside FSDP2 with torch.distributed.checkpoint
    python scripts/bench small_step | visits   what hooks cost in small steps
    python scripts/bench step     one training step, managed against plain PyTorch
    python scripts/bench telemetry   what telemetry costs the training thread
    python scripts/bench timeline   a step that the disk bounds, phase by phase, beside its bounds and others
    python scripts/bench tiny     one Adam step of many small tensors, ours and torch's

Each has its own --help. `--json FILE` writes the result, and `--record` writes it to docs/benchmarks/NAME.json.

A benchmark is a module with ``add_arguments(parser)`` and ``run(arguments) -> dict``. The dict's ``table`` is a list of
rows with the same keys, all text; it is printed here, below what the module itself says of the run. ``ok`` false makes
the exit code 1.
"""

import argparse
import importlib
import re
import shlex
import sys

import record
import report


def names() -> list[str]:
    """Those that the text above tells of."""
    told = re.findall(r"^ {4}python scripts/bench ((?:\w+)(?: \| \w+)*)", __doc__ or "", re.MULTILINE)
    return [name for line in told for name in line.split(" | ")]


def main() -> None:
    known = names()
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked in ("-h", "--help"):
        print(__doc__)
        return
    if asked not in known:
        sys.exit(f"bench: no benchmark {asked!r}; there are {', '.join(known)}")
    # Only what was asked for is imported: some need packages that others do without.
    module = importlib.import_module(asked)
    parser = argparse.ArgumentParser(
        prog=f"bench {asked}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    record.add_arguments(parser)
    arguments = parser.parse_args(sys.argv[2:])
    where = report.machine()
    result = module.run(arguments)
    found = {
        "benchmark": asked,
        "command": shlex.join(["python", "scripts/bench", *sys.argv[1:]]),
        "machine": where,
        **result,
    }
    if result.get("table"):
        print(report.table(result["table"]))
    files = [arguments.json, record.place(asked) if arguments.record else None]
    for path in filter(None, files):
        record.write(found, path)
        print(f"written to {path}", file=sys.stderr)
    sys.exit(0 if result.get("ok", True) else 1)


if __name__ == "__main__":
    main()
