"""What all ranks must have in common before they keep one model together."""

import ctypes
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..chunk import Communicator, Tier
from ..chunk.communicator import Word
from ..config import GeminiConfig
from ..errors import RankError
from ..lazy import is_lazy, seeds
from ..memory.capacity import Capacities
from ..memory.tracker import Budget
from ..nn.optimizer.managed import ManagedOptimizer
from ..torch_private import own_buffers

_LISTED = 3
"""Tensors named in an error."""
_COMMON_OPTIONS = (
    "precision",
    "policy",
    "chunk_numel",
    "search_range",
    "search_step",
    "max_norm",
    "split_master",
    "quantization",
    "force_outputs_fp32",
    "warmup_non_model_ratio",
    "scaler",
    "sync_module_states",
)
"""What chunks, gradients and steps depend on. Sizes of memory may differ: see `agree_capacities`."""


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


def agree_origin(communicator: Communicator) -> str:
    """A text, random and the same on all ranks, that the ids of this model's states begin with."""
    return str(communicator.agree("booster.boost, which names the model's states", secrets.token_hex(8))[0])


def check_options(config: GeminiConfig) -> None:
    """See whether all ranks were given the same options, as far as they must be.

    Raises
    ------
    RankError
        If they were not. Nothing has been changed.
    """
    communicator = config.communicator
    if communicator.owner.is_alone:
        return
    own = {name: repr(getattr(config, name)) for name in _COMMON_OPTIONS}
    own["hybrid_shard_size"] = repr(communicator.owner.count)
    own["gradient_reduction"] = repr("sum" if communicator.gradient_factor == 1.0 else "mean")
    words = _words_of_all(communicator, "booster.boost with the same options", own)
    if (difference := _first_difference(words)) is not None:
        index, names = difference
        found = ", ".join(f"{name}={words[index][name]!s} (rank 0: {words[0][name]!s})" for name in names)
        raise RankError(
            f"rank {index} has other options of GeminiPlugin than rank 0: {found}. Give all ranks the same; only "
            "sizes of memory, folders and max_prefetch may differ"
        )


def check_optimizers(model: nn.Module, optimizer: ManagedOptimizer | None, communicator: Communicator) -> None:
    """See whether the optimizers of all ranks have the same parameters in the same groups, and keep the same states.

    Raises
    ------
    RankError
        If they have not. Nothing has been changed.
    """
    if communicator.owner.is_alone:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own: dict[str, Word] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        assert optimizer is not None
        kept = [f"{spec.name}: {spec.dtype}" for spec in optimizer.rules.of_group(group).slots(group)]
        own |= {names[id(parameter)]: [str(index), *kept] for parameter in group["params"] if id(parameter) in names}
    words = _words_of_all(communicator, "booster.boost with the same optimizer", own)
    if (difference := _first_difference(words)) is not None:
        index, other = difference
        raise RankError(
            f"rank {index} has another optimizer than rank 0: {len(other)} parameters are in other groups, in "
            f"none, or have other states ({', '.join(other[:_LISTED])}). Build the same optimizer with the "
            "same groups on every rank; a parameter that one rank does not use stays in its group"
        )


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
    own: dict[str, Word] = {n: _described(tensor, are_copied) for n, tensor in _tensors(model).items()}
    if not are_copied:
        own["the random state of LazyInitContext"] = [*seeds(model)]
    words = _words_of_all(communicator, "booster.boost of the same model", own)
    if (difference := _first_difference(words)) is not None:
        index, names = difference
        raise RankError(
            f"rank {index} has another model than rank 0: {len(names)} of {len(words[0])} parameters and buffers "
            f"differ ({', '.join(names[:_LISTED])}). Build the same model on every rank, with the same seed "
            "(torch.manual_seed before it is built) or from the same file; or have the values of rank 0 on all with "
            "GeminiPlugin(sync_module_states=True)"
        )


def _words_of_all(communicator: Communicator, doing: str, own: Mapping[str, Word]) -> list[dict[str, Word]]:
    return [dict(word) for word in communicator.agree(doing, own) if isinstance(word, dict)]


def _first_difference(words: Sequence[Mapping[str, Word]]) -> tuple[int, list[str]] | None:
    """The first rank whose word differs from that of rank 0, and the names of what differs."""
    for index, word in enumerate(words):
        if word != words[0]:
            return index, [name for name in {**words[0], **word} if words[0].get(name) != word.get(name)]
    return None


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
