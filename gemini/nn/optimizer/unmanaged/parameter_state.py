"""The optimizer state of one parameter, in ``torch.optim.AdamW``'s layout plus a float32 master copy.

====================  ==================================================================================
``step``              float32 scalar on CPU
``exp_avg``           float32 (float64 for float64 parameters), layout of the parameter
``exp_avg_sq``        likewise
``master``            likewise; only for bfloat16 and float16 parameters, which receive it rounded
====================  ==================================================================================

With reduced states the moments are bfloat16, or uint8 with ``exp_avg_scale`` and ``exp_avg_sq_scale`` beside them
(`moments`). State dicts have float32 moments in every case.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemini.chunk import copy_fault

from ..kernels.forms import MOMENTS
from ..rules.moments import packed, slots, unpacked
from ..rules.option_ranges import brief
from ..rules.rule import BufferSpec, whole_steps
from .memory_order import Order, copy_back, flatten, memory_order

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LOW_PRECISION = (torch.bfloat16, torch.float16)


def needs_master(param: Tensor) -> bool:
    """Whether ``param`` is too coarse to train without a float32 copy."""
    return param.dtype in LOW_PRECISION


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the moments and of the master."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def completed(known: dict[str, Any] | None, param: Tensor, states: str) -> dict[str, Any]:
    """A state with all that an update of ``param`` needs: ``known`` itself, or a copy with what was missing there.

    That is everything at first, and a master after loading. A master of before is left out when the parameter needs
    none any more: it would be out of date if it did again.
    """
    wants_master = needs_master(param)
    if known is not None and "step" in known and ("master" in known) == wants_master:
        return known
    state = dict(known or {})
    if not wants_master:
        state.pop("master", None)
    if "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        for slot in slots(states):
            dtype = state_dtype(param) if states == "fp32" else slot.dtype
            if slot.block_numel == 1:
                state[slot.name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            else:
                state[slot.name] = slot.zeros(param.numel(), param.device)
    if wants_master and "master" not in state:
        state["master"] = param.detach().to(torch.float32)
    return state


def check_saved(saved: Mapping[str, Any], param: Tensor, where: str) -> None:
    """Raise ``ValueError`` if ``saved`` cannot be the Adam state of ``param``; ``where`` names it in the message."""
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in saved]
    if missing:
        raise ValueError(f"{where}: the loaded state has no {', '.join(missing)}; it is not that of an Adam optimizer")
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name not in saved:
            continue
        if not isinstance(saved[name], Tensor) or copy_fault(saved[name]) is not None or saved[name].is_complex():
            raise ValueError(f"{where}: the loaded {name} is {brief(saved[name])}, expected a dense, real tensor")
        if saved[name].shape != param.shape:
            raise ValueError(
                f"{where}: the loaded {name} has shape {tuple(saved[name].shape)}, the parameter {tuple(param.shape)}"
            )
    try:
        whole_steps(saved["step"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def restored(saved: Mapping[str, Any], param: Tensor, *, copy: bool, states: str = "fp32") -> dict[str, Any]:
    """Turn a saved state, ours or torch's, into one for ``param``.

    Parameters
    ----------
    states
        How it is to be kept.
    copy
        Whether tensors that already fit are copied. Sharing them with a state dict would train two optimizers on the
        same memory.
    """
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "step":
            state[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif name in ("exp_avg", "exp_avg_sq") or (name == "master" and needs_master(param)):
            state[name] = _like(value, param, copy)
        elif name != "master":
            state[name] = value.detach().clone() if copy and isinstance(value, Tensor) else value
    if states != "fp32":
        order = memory_order(param)
        flat = packed(states, {name: flatten(state[name], order) for name in MOMENTS})
        state.update({slot.name: _in_layout(flat[slot.name], slot, param) for slot in slots(states)})
    return state


def exported(state: Mapping[str, Any], param: Tensor, states: str) -> dict[str, Any]:
    """A state as state dicts have it: with float32 moments."""
    if states == "fp32" or "exp_avg" not in state:
        return dict(state)
    order, kept = memory_order(param), slots(states)
    moments = unpacked(states, {slot.name: flatten(state[slot.name], _order_of(slot, order)) for slot in kept})
    others = {name: value for name, value in state.items() if name not in {slot.name for slot in kept}}
    return {**others, **{name: _in_layout(flat, BufferSpec(name), param) for name, flat in moments.items()}}


def flat_states(state: Mapping[str, Any], order: Order, states: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """What is kept for a parameter in the order of kernels: each tensor, and its flat form (`layout.flatten`)."""
    return tuple((state[slot.name], flatten(state[slot.name], _order_of(slot, order))) for slot in slots(states))


def _order_of(slot: BufferSpec, order: Order) -> Order:
    return order if slot.block_numel == 1 else None


def _in_layout(flat: Tensor, slot: BufferSpec, param: Tensor) -> Tensor:
    """A flat tensor in the layout of ``param``, unless it has a value for each block only."""
    if slot.block_numel > 1:
        return flat
    shaped = torch.empty_like(param, dtype=flat.dtype, memory_format=torch.preserve_format, requires_grad=False)
    copy_back(flat, shaped, memory_order(param))
    return shaped


def _like(value: Tensor, param: Tensor, copy: bool) -> Tensor:
    fits = value.dtype == state_dtype(param) and value.device == param.device and value.stride() == param.stride()
    if fits and not copy:
        return value
    empty = torch.empty_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False)
    return empty.copy_(value.detach())
