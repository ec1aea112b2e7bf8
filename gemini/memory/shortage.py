"""The error for a computation of the model (activations, temporaries) that found no memory."""

import re

from ..chunk import ChunkManager
from ..errors import OutOfMemory
from ..sizes import format_bytes


def out_of_memory(
    error: BaseException, manager: ChunkManager, held: int, before: int, after: int, torn: str = ""
) -> OutOfMemory:
    """The error to raise in place of torch's.

    Parameters
    ----------
    held
        Bytes of full copies on DEVICE when it happened.
    before, after
        What full copies might and may take.
    torn
        What it has left half done, in words; empty: nothing.
    """
    ledger = manager.ledger
    tier = ledger.memory.compute_tier
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    need = asked[1] if asked is not None else "more memory"
    model_bytes = ledger.used(tier)
    if after < before:
        done = (
            f"Full copies held {format_bytes(held)}; from now on they may take {format_bytes(after)} instead of "
            f"{format_bytes(before)}, so the same batch may fit when tried again"
        )
    else:
        done = f"No full copies are left to give up; homes of chunks hold {format_bytes(model_bytes)} of this tier"
    less = max(ledger.capacity(tier) - max(held, ledger.capacity(tier) // 4), 0)
    left = torn or "Parameters and optimizer states are untouched, the gradients of this backward are dropped"
    return OutOfMemory(
        f"{tier.value} tier out of memory. The model's own computation asked for {need} and the system had none "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). {done}. "
        f"{left[0].upper()}{left[1:]}. Use a smaller batch, checkpoint activations, or set {tier.value}_memory to "
        f"{less} bytes or less"
    )
