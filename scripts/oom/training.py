"""A training under a cap: how far it came, told by the child and understood by the scenario."""

from collections.abc import Callable
from typing import Any

from child import Ended

from gemini.sizes import format_bytes


def attempt(train: Callable[[list[float]], dict[str, Any]]) -> dict[str, Any]:
    """Called by the child: run a training, which appends its losses, and say what came of it besides."""
    import torch

    losses: list[float] = []
    error, out_of_memory = "", False
    more: dict[str, Any] = {}
    try:
        more = train(losses)
    except (torch.OutOfMemoryError, MemoryError) as caught:
        error, out_of_memory = str(caught), True
    except RuntimeError as caught:
        error = str(caught)
        out_of_memory = "can't allocate memory" in error or "bad_alloc" in error
    return {"losses": losses, "error": error[:1000], "out_of_memory": out_of_memory, **more}


def ran_out(ended: Ended) -> bool:
    """True if the training had too little memory, and said so."""
    return ended.result is not None and bool(ended.result["out_of_memory"])


def trained(ended: Ended, steps: int) -> bool:
    """True if the training came to its end."""
    return ended.result is not None and not ended.result["error"] and len(ended.result["losses"]) == steps


def outcome(ended: Ended) -> str:
    """What became of the training, in words."""
    peak = f"{format_bytes(ended.data_growth_bytes)} at peak"
    if ended.result is None:
        last = ended.errors.strip().splitlines()[-1:] or [""]
        return f"died with {ended.returncode}: {last[0][:120]}"
    if ran_out(ended):
        return f"out of memory in step {len(ended.result['losses']) + 1}, {peak}"
    if ended.result["error"]:
        return str(ended.result["error"])[:200]
    return f"{len(ended.result['losses'])} steps, {peak}"
