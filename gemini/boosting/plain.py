"""Back from a boosted model to a plain one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..boosted import Boosted, boosted
from ..chunk import QUIET, Chunk, all_or_none
from ..process_wide import return_freed_memory, trim_freed_memory
from ..runtime.arrivals import unwatch_gradients
from ..step.succession import Superseded
from ..tensor_parallel import is_sharded
from ..torch_private import fits_in_place, is_compiled, own_buffers
from .mixing import take_out
from .parts import unguard_parts
from .release import refuse_gradients

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def to_torch(model: nn.Module, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Take a model out of management, in place: it is the plain module that it was before ``booster.boost``.

    Module, parameters and their ties keep their identity; nothing of ours stays on them. Its optimizer cannot be used
    any more: take ``optimizer.state_dict()`` before, if a plain optimizer is to go on with it.

    Optimizer states are freed first. Then values go over one parameter at a time, and a chunk's homes are freed with
    its last one: beside the plain model there is never more than one chunk. Several ranks call this together, get the
    whole model each, and keep their parts until all have it.

    Parameters
    ----------
    dtype
        Of the parameters. None: fp32 where the model has fp32 masters, as ``model.state_dict()`` gives them; frozen
        parameters keep the dtype in which they compute.
    device
        Where parameters and buffers go. Parameters on a device of another maker than the CPU's and CUDA can only stay.

    Returns
    -------
    nn.Module
        The same object.

    Raises
    ------
    ValueError
        If there are gradients that no step has taken, a running average follows the model, code outside of it holds
        memory of parameters, or a module is compiled (``module.compile()``); or for a ``dtype`` that parameters cannot
        have.
    RuntimeError
        If there is no memory for the parameters, as torch says it. In each case the model goes on as it was.
    """
    state = boosted(model)
    manager = state.manager
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(map(str, _DTYPES))}, or None, got {dtype}")
    with state.engine.lock:
        state.engine.recover()
        with all_or_none(manager.together.communicator, "gemini.to_torch"):
            refuse_gradients(state)
            if manager.device.is_ram:
                return_freed_memory()  # each home that is freed makes room for parameters
            _refuse_compiled(model)
            _refuse_averages(state)
            _refuse_parts(state)
            state.engine.pins.release_held()
            manager.rehoming.refuse_lent(manager.chunks)
            # Their pages come one by one, while homes go.
            room = {chunk: _room(chunk, dtype, torch.device(device)) for chunk in manager.chunks}
            _refuse_other_devices(room)
        if state.telemetry is not None:
            state.telemetry.close("finished")  # its last look is at the chunks
        manager.let_go(room)
    _take_off(model, state, torch.device(device))
    if manager.device.is_ram:
        trim_freed_memory()
    return model


def _room(chunk: Chunk, dtype: torch.dtype | None, device: torch.device) -> list[Tensor]:
    """Memory for the parameters of a chunk, in their order."""
    dtype = dtype or chunk.plan.codec.dtype
    return [torch.empty_strided(slot.shape, slot.stride, dtype=dtype, device=device) for slot in chunk.layout.slots]


def _refuse_other_devices(room: Mapping[Chunk, Sequence[Tensor]]) -> None:
    """Torch lets a parameter go from some devices to the CPU and back, but not from others."""
    for chunk, memory in room.items():
        for binding, data in zip(chunk.bindings, memory, strict=True):
            with QUIET():
                fits = fits_in_place(binding.parameter, data)
            if not fits:
                ours = binding.parameter.device
                raise ValueError(
                    f"parameters on {ours} cannot be moved to {data.device} in place: use to_torch(model, device="
                    f"{ours.type!r}), and load its state_dict() into a model on {data.device}"
                )


def _refuse_compiled(model: nn.Module) -> None:
    compiled = [name or type(model).__name__ for name, module in model.named_modules() if is_compiled(module)]
    if compiled:
        raise ValueError(
            f"{', '.join(compiled[:4])} is compiled, with what brings its parameters: build a plain model and load "
            "model.state_dict() into it"
        )


def _refuse_averages(state: Boosted) -> None:
    if names := [average.name for average in state.step.averages]:
        raise ValueError(
            f"the model has running averages ({', '.join(names)}), which would be lost: keep average.state_dict(), or "
            "swap one in and save the model; then call average.close()"
        )


def _refuse_parts(state: Boosted) -> None:
    if any(is_sharded(parameter) for parameter in state.packing.parameters):
        raise ValueError(
            "the model has parameters that are DTensors, and each rank a part of them: build a plain model and load "
            "model.state_dict() into it"
        )


def _take_off(model: nn.Module, state: Boosted, device: torch.device) -> None:
    """Take off the model all that boosting has put on it, and end what served it."""
    for parameter in state.packing.parameters:
        unwatch_gradients(parameter)
    state.attached.close()
    unguard_parts(model)
    take_out(model, state.original_class)
    if state.optimizer is not None:
        state.optimizer.be_managed(Superseded("has been made a plain one by gemini.to_torch"))
    for module in model.modules():
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                own_buffers(module)[name] = buffer.to(device)
