"""Which torch optimizers can run on pieces of chunks as they are, and what their states are called.

An optimizer is element-wise if what happens to an element depends on this element's values and on numbers that are the
same for all. Its own ``step`` then gives the same bits on any piece of a flat buffer, so nothing has to be written
again: the rule (`elementwise_rule`) hands it pieces.
"""

from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from . import third_party, whole
from .kind import Kind, Options, Shape, always
from .third_party import third_party_kind
from .whole import whole_kind


def _sgd(options: Options) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] != 0 else ()


def _rmsprop(options: Options) -> tuple[str, ...]:
    wanted = {"square_avg": True, "momentum_buffer": options["momentum"] > 0, "grad_avg": options["centered"]}
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _adam(options: Options) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options["amsgrad"] else []))


def _averaged(shape: Shape) -> Mapping[str, Shape]:
    return {"eta": (), "mu": ()}


def _nadam(shape: Shape) -> Mapping[str, Shape]:
    return {"mu_product": ()}


_KINDS: dict[type[Optimizer], Kind] = {
    kind.cls: kind
    for kind in (
        Kind(torch.optim.SGD, _sgd, takes_step=False, keeps_state=lambda options: bool(options["momentum"] != 0)),
        Kind(torch.optim.Adagrad, always("sum"), initial=lambda options: {"sum": options["initial_accumulator_value"]}),
        Kind(torch.optim.RMSprop, _rmsprop),
        Kind(torch.optim.Adadelta, always("square_avg", "acc_delta")),
        Kind(torch.optim.Adamax, always("exp_avg", "exp_inf")),
        Kind(torch.optim.RAdam, always("exp_avg", "exp_avg_sq")),
        Kind(torch.optim.Rprop, always("prev", "step_size")),
        Kind(torch.optim.NAdam, always("exp_avg", "exp_avg_sq"), side=_nadam),
        Kind(torch.optim.ASGD, always("ax"), side=_averaged),
    )
}
"""The classes that are accepted. For the whole process: `add` adds one for all later boosts."""


def kind_of(optimizer: Optimizer) -> Kind | None:
    """What is known of an optimizer's class itself; a subclass may compute something else."""
    cls = type(optimizer)
    return _KINDS.get(cls) or whole_kind(cls) or third_party_kind(cls)


def add(kind: Kind) -> None:
    """Accept a class from now on."""
    _KINDS[kind.cls] = kind


def asks_for_torchs_own(optimizer: Optimizer) -> Kind | None:
    """An Adam with options that `HybridAdam`'s kernels do not have, and torch's own arithmetic has."""
    is_asked = any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)
    return adam_kind(optimizer) if is_asked else None


def adam_kind(optimizer: Optimizer) -> Kind | None:
    """Torch's own Adam and AdamW; None of other optimizers."""
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return Kind(type(optimizer), _adam, called="Adam") if is_adam else None


def names() -> tuple[str, ...]:
    """The classes that are known."""
    return (*(kind.name for kind in _KINDS.values()), *whole.names(), *third_party.named())


def is_known(cls: type[Optimizer]) -> bool:
    """Whether a class is accepted already."""
    is_ours = cls in _KINDS or cls in (torch.optim.Adam, torch.optim.AdamW)
    return is_ours or whole_kind(cls) is not None or third_party_kind(cls) is not None
