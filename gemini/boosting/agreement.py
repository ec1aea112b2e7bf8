"""What all ranks must have in common before they keep one model together."""

import ctypes
import zlib
from dataclasses import replace

from torch import Tensor, nn

from ..chunk import Communicator, Tier
from ..errors import RankError
from ..lazy import is_lazy, seeds
from ..memory.capacity import Capacities
from ..memory.tracker import Budget
from ..torch_private import own_buffers

_LISTED = 3
"""Tensors named in an error."""


def agree_capacities(capacities: Capacities, communicator: Communicator) -> Capacities:
    """The capacities of the rank that has least of each tier: all pack and place alike."""
    if communicator.owner.is_alone:
        return capacities
    own = {tier.value: budget.bytes for tier, budget in capacities.budgets.items()}
    words = [dict(word) for word in communicator.agree("booster.boost", own) if isinstance(word, dict)]
    budgets = dict(capacities.budgets)
    for tier, budget in capacities.budgets.items():
        found = [int(word[tier.value]) for word in words]
        least = min(range(len(found)), key=found.__getitem__)
        if found[least] < budget.bytes:
            budgets[tier] = Budget(found[least], f"what rank {least} has")
    limits = capacities.device_limit_bytes
    if limits is not None and budgets[Tier.DEVICE].bytes < capacities.budgets[Tier.DEVICE].bytes:
        limits = min(limits, budgets[Tier.DEVICE].bytes * limits // max(capacities.budgets[Tier.DEVICE].bytes, 1))
    return replace(capacities, budgets=budgets, device_limit_bytes=limits)


def check_alike(model: nn.Module, communicator: Communicator, are_copied: bool) -> None:
    """See whether all ranks have the same model.

    Parameters
    ----------
    are_copied
        The values will be those of the first rank, so that they may differ.

    Raises
    ------
    RankError
        If they have not. Nothing has been changed.
    """
    if communicator.owner.is_alone:
        return
    own: dict[str, list[str | int]] = {n: _described(tensor, are_copied) for n, tensor in _tensors(model).items()}
    if not are_copied:
        own["the random state of LazyInitContext"] = [*seeds(model)]
    words = [
        dict(word) for word in communicator.agree("booster.boost of the same model", own) if isinstance(word, dict)
    ]
    for index, word in enumerate(words):
        if word == words[0]:
            continue
        names = [name for name in {**words[0], **word} if words[0].get(name) != word.get(name)]
        raise RankError(
            f"rank {index} has another model than rank 0: {len(names)} of {len(words[0])} parameters and buffers "
            f"differ ({', '.join(names[:_LISTED])}). Build the same model on every rank, with the same seed "
            "(torch.manual_seed before it is built) or from the same file; or have the values of rank 0 on all with "
            "GeminiPlugin(sync_module_states=True)"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    buffers = {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in own_buffers(module).items()
        if buffer is not None
    }
    return {**dict(model.named_parameters()), **buffers}


def _described(tensor: Tensor, is_copied: bool) -> list[str | int]:
    values = 0 if is_copied or is_lazy(tensor) else _crc(tensor)
    return [str(tuple(tensor.shape)), str(tensor.dtype), int(tensor.requires_grad), values]


def _crc(tensor: Tensor) -> int:
    dense = tensor.detach().cpu()
    if dense.layout.__str__() != "torch.strided":
        dense = dense.to_dense()
    dense = dense.contiguous()
    return zlib.crc32((ctypes.c_char * dense.nbytes).from_address(dense.data_ptr())) if dense.nbytes else 0
