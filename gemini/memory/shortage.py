"""The error for a computation of the model (activations, temporaries) that found no memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..chunk import ChunkManager, Ledger
from ..errors import OutOfMemory, is_out_of_memory
from ..sizes import format_bytes, parse_bytes


@dataclass(frozen=True, slots=True)
class Given:
    """What model data have given up for a computation that ran out of memory."""

    held_bytes: int
    """Full copies that were there when it did."""
    before_bytes: int
    """What full copies might take."""
    after_bytes: int
    """What they may take from now on."""
    moved_bytes: int
    """Homes that have gone down a tier."""
    keeps_less: bool
    """The next forward keeps less of what it saves for backward."""

    @property
    def is_something(self) -> bool:
        return self.after_bytes < self.before_bytes or self.moved_bytes > 0 or self.keeps_less


def asked_bytes(error: BaseException) -> int:
    """The bytes of the allocation that failed, as far as the error says."""
    found = _asked(error)
    if found is None:
        return 0
    return int(found.split()[0]) if found.endswith("bytes") else parse_bytes(found)


def _asked(error: BaseException) -> str | None:
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    return None if asked is None else asked[1]


def out_of_memory(
    error: BaseException, manager: ChunkManager, given: Given, torn: str = "", obstacle: str = ""
) -> OutOfMemory:
    """The error to raise in place of torch's.

    Parameters
    ----------
    torn
        What it has left half done, in words; empty: nothing.
    obstacle
        Why a forward was not run again, in words; empty: there would be no more room for it, or it was no forward.
    """
    ledger = manager.ledger
    tier = ledger.memory.compute_tier
    need = _asked(error) or "more memory"
    done = []
    if given.after_bytes < given.before_bytes:
        done.append(
            f"Full copies held {format_bytes(given.held_bytes)}; from now on they may take "
            f"{format_bytes(given.after_bytes)} instead of {format_bytes(given.before_bytes)}"
        )
    if given.moved_bytes:
        done.append(f"{format_bytes(given.moved_bytes)} of homes have gone down a tier")
    if given.keeps_less:
        done.append("The next forward keeps less of what it saves for backward")
    if done:
        done[-1] += ", so the same batch may fit when tried again"
    else:
        homes = ledger.used(tier)
        done.append(f"No full copies are left to give up; homes of chunks hold {format_bytes(homes)} of this tier")
    if obstacle:
        done.append(f"The forward could not be run again at once, since {obstacle}")
    less = max(ledger.capacity(tier) - max(given.held_bytes, ledger.capacity(tier) // 4), 0)
    left = torn or "Parameters and optimizer states are untouched, the gradients of this backward are dropped"
    return OutOfMemory(
        f"{tier.value} tier out of memory. The model's own computation asked for {need} and the system had none "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). {'. '.join(done)}. "
        f"{left[0].upper()}{left[1:]}. Use a smaller batch, checkpoint activations, or set {tier.value}_memory to "
        f"{less} bytes or less"
    )


@contextmanager
def told(ledger: Ledger, doing: str) -> Iterator[None]:
    """Have an allocation that fails within be an `OutOfMemory`. What is done there is done as a whole or not at all.

    Parameters
    ----------
    doing
        What is done, in words.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        tier = ledger.memory.compute_tier.value
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemory(
            f"{tier} tier out of memory in {doing} ({cause}). Nothing has been changed, and it can be "
            f"tried again. If it fails again, set {tier}_memory to less than "
            f"{ledger.capacity(ledger.memory.compute_tier)} bytes, so that more is left beside model data"
        ) from error
