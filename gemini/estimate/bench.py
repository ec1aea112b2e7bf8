"""``gemini-stat bench``: what this machine's links, disk and processor do, for ``estimate`` and the live screen."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from gemini.arguments.command_line import option
from gemini.arguments.places import Name
from gemini.arguments.rules import Size, Whole
from gemini.chunk import find_accelerator
from gemini.errors import OffloadError
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.safe_files import make_own_folder
from gemini.stat.console import Exit, Usage, print_json
from gemini.stat.estimate_outputs import Bench, DiskBench
from gemini.stat.rates import hardware_file
from gemini.stat.text import count, size
from gemini.telemetry.encoding import as_mapping
from gemini.telemetry.files import read_document
from gemini.telemetry.layout import disks_folder
from gemini.telemetry.run_folder import write_document

from .disk_bench import DEFAULT_BYTES, DiskFound, as_lines, measure_disk

HELP = "Measures this machine's bandwidths and writes them where estimate and the live screen look."
TARGET = "FOLDER"
TARGET_HELP = "folder of the disk tier; nothing: the disk is not measured"

_NUMEL = 1 << 24
_LAYERS, _WIDTH, _VOCABULARY = 2, 512, 8192
_BATCH_SIZE, _LENGTH = 2, 256
_SECONDS = 0.5
"""Each number is the best of the repetitions that fit into so long, at least three."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--numel",
        type=option(Whole(1 << 12, 1 << 34)),
        default=_NUMEL,
        metavar="N",
        help="elements of the chunk that is moved",
    )
    parser.add_argument(
        "--disk-size", type=option(Size()), default=DEFAULT_BYTES, metavar="SIZE",
        help="of the scratch file in FOLDER: more than what caches on the way to the disk hold "
        f"({DEFAULT_BYTES >> 30}GiB, "
        "at most half of what is free)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=option(Name()), metavar="FILE", help=f"default: {hardware_file()}")


def run(options: argparse.Namespace) -> Exit:
    disk = _disk(options)
    links = measure_links(options.numel) | ({} if disk is None else disk.bytes_per_second)
    content = Bench(
        host=os.uname().nodename,
        measured_at=time.time(),
        bytes_per_second=links,
        adam_elements_per_second=measure_adam(options.numel),
        flops_per_second=measure_flops(),
        training_flops_per_second=measure_training(),
        disk=None if disk is None else _as_output(Path(options.target), disk),
    )
    file = options.output or hardware_file()
    make_own_folder(file.parent) if options.output is None else file.parent.mkdir(parents=True, exist_ok=True)
    write_document(file, as_mapping(content))
    if options.json:
        print_json(content)
    else:
        for name, value in links.items():
            spread = "" if disk is None or name not in disk.rates else _spread(disk.rates[name])
            print(f" {name.replace('_', ' '):<18}{size(value):>12}/s{spread}")
        print(f" {'optimizer':<18}{count(content.adam_elements_per_second):>12} elements/s")
        print(f" {'matrix products':<18}{count(content.flops_per_second):>12} flop/s in bf16")
        print(f" {'a GPT':<18}{count(content.training_flops_per_second):>12} flop/s in bf16, forward and backward")
        print(f" written to {file}")
        if disk is not None:
            for line in as_lines(Path(options.target), disk):
                print(f" {line}")
    return Exit.OK


def _disk(options: argparse.Namespace) -> DiskFound | None:
    if options.target is None:
        return None
    try:
        return measure_disk(Path(options.target), options.disk_size, disks_folder())
    except ValueError as error:
        raise Usage(f"--disk-size: {error}") from error
    except OffloadError as error:
        raise Usage(error.strerror or str(error)) from error
    except OSError as error:
        raise Usage(f"{options.target}: {error.strerror}; give a folder that you may write to") from error


def _as_output(folder: Path, disk: DiskFound) -> DiskBench:
    return DiskBench(
        folder=str(folder.resolve()),
        file_system=disk.file_system,
        is_direct=disk.is_direct,
        request_bytes=disk.requests.nbytes,
        depth=disk.requests.depth,
        file_bytes=disk.file_bytes,
        rounds={link: list(found) for link, found in disk.rates.items()},
        remembered_in=str(disk.remembered_in),
        remarks=disk.remarks,
    )


def _spread(rounds: Sequence[float]) -> str:
    return f"   ({size(min(rounds))} to {size(max(rounds))} in {len(rounds)} rounds)"


def read_speed(path: Path | None = None) -> dict[str, float]:
    """All measured numbers by name, flat; empty before the first ``bench``."""
    try:
        content = read_document(path or hardware_file())
        return {
            **content["bytes_per_second"],
            **{k: v for k, v in content.items() if k.endswith("_per_second") and isinstance(v, float)},
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def measure_links(numel: int) -> dict[str, float]:
    """Filling a full copy from RAM, as fetches do: bytes of the full copy per second."""
    master = torch.zeros(numel)
    if (device := find_accelerator()) is not None:
        full = torch.empty(numel, dtype=torch.bfloat16, device=device)
        pinned = master.bfloat16().pin_memory()

        def up() -> None:
            full.copy_(pinned, non_blocking=True)
            torch.accelerator.synchronize()

        def down() -> None:
            pinned.copy_(full, non_blocking=True)
            torch.accelerator.synchronize()

        return {"host_to_device": full.nbytes / best(up), "device_to_host": full.nbytes / best(down)}
    full = torch.empty(numel, dtype=torch.bfloat16)
    return {"host_to_device": full.nbytes / best(lambda: full.copy_(master))}


def measure_adam(numel: int) -> float:
    """Elements a second of the kernel that the managed optimizer runs on the CPU."""
    hyper = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True)
    once = scalars(hyper, 1)
    master, exp_avg, exp_avg_sq = (torch.zeros(numel) for _ in range(3))
    gradient, full = (torch.zeros(numel, dtype=torch.bfloat16) for _ in range(2))
    return numel / best(lambda: adam_update("fp32", (master, exp_avg, exp_avg_sq), gradient, once, full))


def measure_flops() -> float:
    device = find_accelerator()
    side = 1024 if device is None else 4096
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))

    def product() -> None:
        a @ b
        if device is not None:
            torch.accelerator.synchronize()

    return 2 * side**3 / best(product)


def measure_training() -> float:
    """What is left of these products in a training: forward and backward of a small GPT, without an optimizer."""
    device = find_accelerator() or torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        blocks = [
            nn.TransformerEncoderLayer(_WIDTH, _WIDTH // 64, 4 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(_LAYERS)
        ]
        head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        tokens = torch.randint(_VOCABULARY, (_BATCH_SIZE, _LENGTH)).to(device)
    model = nn.Sequential(*blocks, head).to(device, torch.bfloat16)
    causal = nn.Transformer.generate_square_subsequent_mask(_LENGTH, device, torch.bfloat16)

    def both() -> None:
        hidden = functional.embedding(tokens, head.weight)
        for block in blocks:
            hidden = block(hidden, src_mask=causal, is_causal=True)
        functional.cross_entropy(head(hidden).flatten(0, 1), tokens.flatten()).backward()
        model.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return 6 * sum(p.numel() for p in model.parameters()) * tokens.numel() / best(both)


def best(action: Callable[[], object]) -> float:
    """Seconds of the quickest repetition; the first one, which warms up, does not count."""
    action()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < _SECONDS and len(taken) < 100):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return max(min(taken), 1e-9)
