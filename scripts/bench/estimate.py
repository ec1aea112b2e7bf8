"""What ``gemini-stat estimate`` says of a step that the disk bounds, beside such a step, part by part.

The machine is measured as ``gemini-stat bench`` does it, before and after the training; both numbers are shown, and
their mean is used, so that a busy machine is seen. The estimate is that of the placement with which the steps ran.
Columns: the estimate, what was measured, and the first over the second, which is to be 0.85 to 1.15 for the step.

The line "as fast as in RAM" is the estimate with the speed of computing that the same model has in RAM, in turns with
the one on disk. On a busy machine it tells errors of the model (what waits for what) from errors of the speeds.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import timeline
import torch

from gemini.boosted import boosted
from gemini.estimate.bench import measure_adam, measure_flops, measure_links, measure_training
from gemini.estimate.disk_bench import measure_disk
from gemini.estimate.step_model import Training, disk_rates, step_seconds
from gemini.sizes import parse_bytes

NUMEL = 1 << 24
STATE_BYTES = 12.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    timeline.add_arguments(parser)
    parser.add_argument("--disk-size", default="1GiB", help="of the file with which the disk is measured")


def measured_speed(folder: Path, disk_bytes: int) -> dict[str, float]:
    """The numbers of ``gemini-stat bench``, of now."""
    return {
        **measure_links(NUMEL),
        **measure_disk(folder, disk_bytes, folder).bytes_per_second,
        "adam_elements_per_second": measure_adam(NUMEL),
        "flops_per_second": measure_flops(),
        "training_flops_per_second": measure_training(),
    }


def estimated(row: timeline.Row, tokens: int, speed: Mapping[str, float]) -> dict[str, float]:
    """Of a model as it is placed now."""
    found = boosted(row.model)
    training = Training(
        tokens=tokens, checkpointing=False, state_bytes=STATE_BYTES, in_backward=False, ahead=True,
        prefetched=found.config.max_prefetch,
    )  # fmt: skip
    return step_seconds(row.model, found.packing, found.engine.room.full_capacity_bytes, training, speed)


def run(options: argparse.Namespace) -> dict[str, object]:
    recording = timeline.Recording()
    tokens = torch.randint(0, options.vocabulary, (options.batch_size, options.seq_len))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, disk_bytes = Path(name), parse_bytes(options.disk_size)
        before = measured_speed(folder, disk_bytes)
        rows = {
            "on disk": timeline.Row(options, host_memory=options.host_memory, offload_dir=folder),
            "in RAM": timeline.Row(options),
        }
        with timeline.recorded(recording):
            for _ in range(1 + options.rounds):
                for each in rows.values():
                    each.turn(tokens, recording)
        after = measured_speed(folder, disk_bytes)
    speed = {key: (before[key] + after[key]) / 2 for key in before}
    said = {key: estimated(each, tokens.numel(), speed) for key, each in rows.items()}
    disk, in_ram = rows["on disk"], rows["in RAM"]
    computing = in_ram.median("seconds") - said["in RAM"].get("optimizer", 0.0)
    factor = said["in RAM"]["computing"] / max(computing, 1e-9)
    as_in_ram = {**speed, "training_flops_per_second": speed["training_flops_per_second"] * factor}
    as_fast = estimated(disk, tokens.numel(), as_in_ram).get("step", 0.0)
    moved = (disk.median("read MiB") + disk.median("written MiB")) * timeline.MIB
    rates = disk_rates(speed)
    assert rates is not None
    parts = {
        "step": (said["on disk"].get("step", 0.0), disk.median("seconds")),
        "step, as fast as in RAM": (as_fast, disk.median("seconds")),
        "step in RAM": (said["in RAM"].get("step", 0.0), in_ram.median("seconds")),
        "forward and backward in RAM": (
            said["in RAM"]["computing"], in_ram.median("forward") + in_ram.median("backward")
        ),
        "disk": (said["on disk"].get("disk", 0.0), moved / rates.mixed),
        "waiting": (said["on disk"].get("waiting", 0.0), disk.median("seconds") - in_ram.median("seconds")),
    }  # fmt: skip
    for key, value in before.items():
        print(f"{key:<30}{value:>12.3g} before {after[key]:>12.3g} after")
    table = [
        {
            "seconds": key,
            "estimate": f"{estimate:.3f}",
            "measured": f"{measured:.3f}",
            "ratio": f"{estimate / measured:.2f}" if measured > 0 else "-",
        }
        for key, (estimate, measured) in parts.items()
    ]
    return {"table": table, "parts": parts, "speed": {"before": before, "after": after}}
