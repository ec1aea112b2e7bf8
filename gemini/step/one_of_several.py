"""When one of several optimizers of a model may step by itself."""

from ..chunk import ChunkManager
from ..updates.updates import Updates


def refuse_alone(manager: ChunkManager, updates: Updates) -> None:
    """Raise where a step of one would use up, or count, what belongs to a step of all.

    Raises
    ------
    ValueError
        Nothing has been changed.
    """
    scaling = updates.scaling
    reasons = {
        "precision='fp16' decides of all gradients whether a step is skipped": scaling.scaler is not None,
        "max_norm=... clips all gradients together": scaling.clips,
        "clip_grad_by_norm has clipped the gradients of all": scaling.has_clipped,
        "update_in_backward=True has begun the step of all": updates.schedule.consumes_gradients,
        "a running average follows the steps of all": any(chunk.plan.averages for chunk in manager.chunks),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"one of several optimizers cannot step by itself here: {reason}. Call step() of what booster.boost "
                "returned for them, which steps all"
            )
