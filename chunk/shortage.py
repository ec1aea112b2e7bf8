"""Errors where a full copy gets no memory: what it needs, which chunks hold the tier, which capacity would do."""

from collections.abc import Sequence

from gemini.errors import OutOfMemory
from gemini.sizes import format_bytes

from .chunk import Chunk
from .ledger import Ledger
from .tier import Tier

HOLDERS_NAMED = 4
"""How many chunks a message names."""


def no_room(ledger: Ledger, chunks: Sequence[Chunk], chunk: Chunk, keep: Sequence[Chunk]) -> OutOfMemory:
    """The error where the capacity is used up by ``chunks`` that are in use, and nothing is left to evict."""
    tier = ledger.memory.compute_tier
    free = ledger.free(Tier.DEVICE)
    missing = sum(c.full_nbytes for c in {chunk, *keep} if not c.is_resident)  # the others are asked for next
    enough = ledger.capacity(tier) + missing - free
    return OutOfMemory(
        f"{tier.value} tier out of memory. {_needs(chunk)}, {format_bytes(free)} are free, {_holders(chunks)}; "
        f"set {tier.value}_memory to {enough} bytes ({format_bytes(enough)}) or more"
    )


def refused(ledger: Ledger, chunks: Sequence[Chunk], chunk: Chunk, error: BaseException) -> OutOfMemory:
    """The error where the capacity has room and the system gives no memory."""
    tier = ledger.memory.compute_tier
    less = max(ledger.capacity(tier) - chunk.full_nbytes, 0)
    return OutOfMemory(
        f"{tier.value} tier out of memory. {_needs(chunk)}; of the capacity of {format_bytes(ledger.capacity(tier))} "
        f"{format_bytes(ledger.free(Tier.DEVICE))} are free, but the system gives no more "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); {_holders(chunks)}; use a smaller "
        f"batch or checkpoint activations, or set {tier.value}_memory to {less} bytes ({format_bytes(less)}) or less"
    )


def _needs(chunk: Chunk) -> str:
    return f"Chunk {chunk.index} (with {chunk.layout.slots[0].name}) needs {format_bytes(chunk.full_nbytes)}"


def _holders(chunks: Sequence[Chunk]) -> str:
    """Which full copies are in the way."""
    held = [c for c in chunks if c.is_resident and c.full_nbytes]
    largest = sorted(held, key=lambda c: -c.full_nbytes)[:HOLDERS_NAMED]
    named = ", ".join(f"{c.index} (with {c.layout.slots[0].name}, {format_bytes(c.full_nbytes)})" for c in largest)
    more = f" and {len(held) - len(largest)} more" if len(held) > len(largest) else ""
    total = format_bytes(sum(c.full_nbytes for c in held))
    return f"chunks in use hold {total}{f': {named}{more}' if named else ''}, none is left to evict"
