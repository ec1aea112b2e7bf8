"""Which optimizers look at whole parameters, and how they are accepted: their own ``step`` gets one at a time.

The slot of a parameter is contiguous in its chunk, and so are those of its states, so the optimizer can be given them
in the parameter's shape (`whole_rule`). What has another shape, as the rows and columns of Adafactor, is small, and
stays in RAM beside the chunks.
"""

from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from .kind import Kind, Options, Shape, always


def _adafactor(shape: Shape) -> Mapping[str, Shape]:
    if len(shape) > 1:
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    return {"variance": shape}


def _transformers_adafactor(shape: Shape) -> Mapping[str, Shape]:
    if len(shape) > 1:
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1]), "RMS": ()}
    return {"exp_avg_sq": shape, "RMS": ()}


def _first_moment(options: Options) -> tuple[str, ...]:
    return ("exp_avg",) if options["beta1"] is not None else ()


_KINDS: dict[type[Optimizer], Kind] = {
    kind.cls: kind
    for kind in (
        Kind(torch.optim.Muon, always("momentum_buffer"), takes_step=False, is_whole=True),
        Kind(torch.optim.Adafactor, always(), side=_adafactor, is_whole=True),
    )
}
"""For the whole process: `add` adds one for all later boosts."""


def whole_kind(cls: type[Optimizer]) -> Kind | None:
    """What is known of a class itself; a subclass may compute something else."""
    if (cls.__module__, cls.__qualname__) == ("transformers.optimization", "Adafactor"):
        called = "transformers.Adafactor"
        return Kind(cls, _first_moment, called=called, side=_transformers_adafactor, is_whole=True)
    return _KINDS.get(cls)


def add(kind: Kind) -> None:
    """Accept a class from now on."""
    _KINDS[kind.cls] = kind


def names() -> tuple[str, ...]:
    """The classes that are known."""
    return (*(kind.name for kind in _KINDS.values()), "transformers.Adafactor")
