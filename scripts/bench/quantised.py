"""What a fetch of quantised weights costs: from codes to a full copy in bf16, beside a plain copy and beside others.

Gigabytes of the full copy a second, one thread, in pieces that stay in the caches as a fetch makes them, and millions
of numbers a second for the way there. bitsandbytes is measured where it is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch

from gemini.chunk import FORMATS, BlockFormat, block_codes, dequantise, quantise

PIECE_NUMEL = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=15)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    numel = arguments.numel // PIECE_NUMEL * PIECE_NUMEL
    values, full = torch.randn(numel), torch.empty(numel, dtype=torch.bfloat16)
    plain = values.bfloat16()
    actions: dict[str, Callable[[], object]] = {"bf16 copy": lambda: full.copy_(plain)}
    for form in FORMATS.values():
        actions |= _of_format(form, values, full)
    for action in actions.values():
        action()  # compiles
    seconds = report.take_turns({name: _timed(action) for name, action in actions.items()}, arguments.repeats)
    found = {name: statistics.median(measured) for name, measured in seconds.items()}
    table = []
    for name, median in found.items():
        if name.startswith("quantised"):
            count = 1 << 20 if name.endswith("by torch") else numel
            rate = f"{count / median / 1e6:.0f} million numbers/s"
        else:
            rate = f"{full.nbytes / median / 1e9:.2f} GB/s"
        table.append({"what": name, "rate": rate})
    return {"table": table, "numel": numel, "seconds": found}


def _timed(action: Callable[[], object]) -> Callable[[], float]:
    """The action, returning the seconds that this thread, the only one, was on a core."""

    def run_it() -> float:
        begin = time.thread_time()
        action()
        return time.thread_time() - begin

    return run_it


def _of_format(form: BlockFormat, values: torch.Tensor, full: torch.Tensor) -> dict[str, Callable[[], object]]:
    codes, absmax = block_codes.encode(values, form)
    per_byte = form.codes_per_byte

    def pieces(decode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> Callable[[], object]:
        def all_of_them() -> None:
            for start in range(0, full.numel(), PIECE_NUMEL):
                stop = start + PIECE_NUMEL
                of_piece = codes[start // per_byte : stop // per_byte].clone(), absmax[start // 64 : stop // 64].clone()
                decode(full[start:stop], *of_piece)

        return all_of_them

    found: dict[str, Callable[[], object]] = {
        f"{form.name} dequantised": pieces(lambda out, *stored: block_codes.decode_into(out, *stored, form)),
        f"{form.name} dequantised by torch": pieces(lambda out, *s: out.copy_(dequantise(*s, form, out.dtype))),
        f"quantised to {form.name}": lambda: block_codes.encode(values, form),
        f"quantised to {form.name} by torch": lambda: quantise(values[: 1 << 20], form),
    }
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return found
    if form.name == "nf4":
        theirs = torch.ops.bitsandbytes.dequantize_4bit
        found["nf4 dequantised by bitsandbytes"] = lambda: full.copy_(
            theirs(codes, absmax, 64, "nf4", (full.numel(),), torch.bfloat16).view(-1)
        )
    return found
