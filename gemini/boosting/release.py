"""Giving the memory of a boosted model back for a while, and taking it again: its homes lie on disk in between."""

import shutil
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..boosted import Boosted, boosted
from ..chunk import ChunkPlan, DiskBackend, Ledger, Tier, all_or_none
from ..errors import OutOfMemory
from ..process_wide import trim_freed_memory
from ..sizes import format_bytes


def release(model: nn.Module, folder: str | Path | None = None) -> None:
    """Give back the device and host memory of a boosted model and its optimizer; their values go to disk.

    As trainers of reinforcement learning do between their phases. Until `resume`, parameters and states can be read
    and saved (from disk); forward, backward and step raise StateError. A model that is released already stays so.

    Parameters
    ----------
    folder
        Where the values go: into a file without a name, which is gone when the process ends. None: the ``offload_dir``
        of the plugin. A model that has homes on disk uses the file that it has.

    Raises
    ------
    ValueError
        If there is no folder, there are gradients that no step has taken, or code outside of the model holds memory of
        parameters.
    OutOfMemory, OffloadError
        If the folder has no room. In each case the model goes on as it was.
    """
    state = boosted(model)
    manager = state.manager
    if manager.rehoming.parking is not None:
        return
    with state.engine.lock:
        state.engine.recover()
        with all_or_none(manager.together.communicator, "booster.release"):
            refuse_gradients(state)
            parking = _own_disk(state, folder) or _parking(state, folder)
        state.engine.pins.release_held()
        manager.snapshots.rest()
        plans = [_on_disk(chunk.plan) for chunk in manager.chunks if not _is_on_disk(chunk.plan)]
        try:
            manager.rehoming.release(plans, parking)
        except BaseException:
            if parking is not manager.disk:
                parking.close()
            raise
        state.engine.memory.displaced(state.packing.with_plans([chunk.plan for chunk in manager.chunks]))
    if manager.device.is_ram:
        trim_freed_memory()


def resume(model: nn.Module) -> None:
    """Take memory for a released model again, with the same placement; training goes on as if nothing had been.

    A model that is not released stays as it is.

    Raises
    ------
    OutOfMemory, OffloadError
        If there is no room, or the values cannot be read. The model is still released then.
    """
    state = boosted(model)
    manager, packing = state.manager, state.packing
    if manager.rehoming.parking is None:
        return
    with state.engine.lock:
        manager.snapshots.rest()
        manager.rehoming.resume([plan for plan in packing.plans if not _is_on_disk(plan)])
        state.engine.memory.adopt(packing)


def _own_disk(state: Boosted, folder: str | Path | None) -> DiskBackend | None:
    """The disk tier that the model has; None where it has none, or has nothing there and is to have it elsewhere."""
    return state.manager.disk if folder is None or state.packing.placement.uses_disk else None


def _is_on_disk(plan: ChunkPlan) -> bool:
    return set(plan.tiers.values()) == {Tier.DISK}


def _on_disk(plan: ChunkPlan) -> ChunkPlan:
    return replace(plan, tiers=dict.fromkeys(plan.tiers, Tier.DISK), full_is_home=False)


def refuse_gradients(state: Boosted) -> None:
    """Raise ValueError if chunks have gradients that no step has taken."""
    chunks = [chunk for chunk in state.manager.chunks if chunk.gradient is not None and chunk.gradient.present]
    if chunks:
        count = sum(len(chunk.gradient.present) for chunk in chunks if chunk.gradient is not None)
        name = chunks[0].layout.slots[0].name
        raise ValueError(
            f"{count} parameters have gradients (in the chunk with {name}, for one), which would be lost: do this "
            "after optimizer.step() and optimizer.zero_grad()"
        )


def _parking(state: Boosted, folder: str | Path | None) -> DiskBackend:
    chosen = folder if folder is not None else state.config.offload_dir
    if chosen is None:
        raise ValueError(
            "booster.release needs a folder for the values: booster.release(model, folder=...), or "
            "GeminiPlugin(offload_dir=...)"
        )
    path = Path(chosen)
    path.mkdir(parents=True, exist_ok=True)
    need = sum(sum(chunk.plan.nbytes(name) for name in chunk.plan.tiers) for chunk in state.manager.chunks)
    free = shutil.disk_usage(path).free
    if need > free:
        raise OutOfMemory(
            f"releasing the model needs {format_bytes(need)} in {str(path)!r}, where {format_bytes(free)} are free; "
            "give another folder"
        )
    return DiskBackend(path, Ledger({Tier.DISK: free}, state.manager.ledger.memory))
