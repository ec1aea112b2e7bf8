"""Boosting a model: from a plain (or lazy) module and its optimizer to chunks, hooks and a managed step."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..activations import Saving, beside_activations, check_place, make_saving
from ..boosted import Boosted
from ..checkpoint import serve_parts
from ..chunk import BufferSpec, ChunkManager, all_or_none, warm_up_codes
from ..config import GeminiConfig
from ..errors import GeminiError, OutOfMemory, is_out_of_memory
from ..memory.capacity import Capacities, find_capacities
from ..memory.system_memory import check_least_room, is_of_ram, refused_memory
from ..memory.tracker import NonModelMeter, host_budget, host_headroom
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.adam_rule import ADAM
from ..nn.optimizer.rules.rules import OneRule
from ..packing.packing import MANAGED_DTYPES, Packing, decide
from ..process_wide import bound_kernels, return_freed_memory
from ..quantization import Quantization
from ..system_limits import refused
from ..telemetry.writer import TelemetryWriter
from ..updates.update_queue import UpdateQueue, warm_up
from .agreement import agree_capacities, check_alike, check_optimizers, check_options
from .alive import dismiss, enrol, ram_of_others
from .assemble import assemble
from .build import build
from .dtypes import warn_of_other_dtypes
from .fill import fill, given_state, take_over_states
from .local_parts import check_groups, local_parts
from .mixing import mix_in
from .module import GeminiModule
from .parts import guard_parts
from .refusals import refuse_model, refuse_optimizer, refuse_sharing, refuse_split_master, refuse_whole
from .seating import Seating
from .succession import bind_optimizer


def boost_model(model: nn.Module, optimizer: ManagedOptimizer | None, config: GeminiConfig) -> GeminiModule:
    """Put a model under management, in place.

    Parameters
    ----------
    model
        Plain or lazy; parameters keep their identity, names and ties.
    optimizer
        Built on the model's parameters; None for inference, where no parameter gets states or a gradient buffer.
    config
        What the user asked for.

    Raises
    ------
    OutOfMemory, OffloadError, LimitError, ValueError
        If it cannot work. Model and optimizer are as they were before then.
    """
    free_bytes, _ = host_headroom()
    seating = Seating(replace(config, quantization=Quantization.for_model(model, config.quantization)))
    try:
        return _boost(model, optimizer, seating)
    except BaseException as error:
        seating.leave()
        if (told := refused(error)) is not None:
            raise told from error
        if is_out_of_memory(error) and is_of_ram(error) and not isinstance(error, GeminiError):
            raise refused_memory(error, free_bytes, config.host_memory or host_budget().bytes) from error
        raise


def _boost(model: nn.Module, optimizer: ManagedOptimizer | None, seating: Seating) -> GeminiModule:
    config = seating.config
    communicator = config.communicator
    with ExitStack() as until_built:
        with all_or_none(communicator, "booster.boost, which refuses some models"):
            until_built.enter_context(local_parts(model, optimizer))
            _refuse(model, optimizer, config)
            check_least_room()
            _warm_up(optimizer, config, {torch.device("cpu")}, _trained_dtypes(optimizer, config))
            if config.quantization is not None:
                warm_up_codes(config.quantization.form)
            capacities = seating.take(model, optimizer, find_capacities(config))
            check_place(config, capacities)
        check_groups(model, communicator)
        check_options(config)
        check_alike(model, communicator, config.sync_module_states)
        check_optimizers(model, optimizer, communicator)
        capacities = agree_capacities(capacities, communicator)
        bound_kernels()
        with all_or_none(communicator, "booster.boost, which takes memory"):
            packing = _decide(model, optimizer, config, capacities)
            manager, queue = build(packing, config, capacities)
            saving = make_saving(config, capacities, manager, model)

    meter = NonModelMeter(capacities.device, elsewhere=partial(ram_of_others, manager))
    compute_dtypes = {plan.compute_dtype for plan in packing.plans if plan.is_trainable}
    _warm_up(optimizer, config, {capacities.device, torch.device("cpu")}, compute_dtypes)
    if manager.device.is_ram:
        return_freed_memory()  # else values of a moment stay on malloc's heap, between small objects that live on
    fill(model, packing, manager, capacities.device, config.sync_module_states)
    if optimizer is not None:
        take_over_states(optimizer, manager)
    manager.together.serve()

    state = assemble(model, optimizer, config, capacities, packing, manager, queue, meter, saving, seating)
    boosted = _install(model, optimizer, state, queue)
    state.attached.callback(weakref.finalize(model, seating.leave))
    if manager.device.is_ram:
        return_freed_memory()  # so that what malloc kept of the building is no part of where the measurement begins
    meter.start()
    return boosted


def _refuse(model: nn.Module, optimizer: ManagedOptimizer | None, config: GeminiConfig) -> None:
    refuse_model(model)
    if optimizer is not None:
        refuse_optimizer(model, optimizer)
        rules = [optimizer.rules.of_group(group) for group in optimizer.param_groups]
        if whole := [rule for rule in rules if rule.is_whole]:
            refuse_whole(model, whole[0].name, config.communicator.owner.count)
    if not config.communicator.owner.is_alone:
        refuse_sharing(model)
    if config.split_master:
        refuse_split_master(model, optimizer)


def _trained_dtypes(optimizer: ManagedOptimizer | None, config: GeminiConfig) -> set[torch.dtype]:
    """Of the gradients to come."""
    groups = optimizer.param_groups if optimizer is not None else ()
    own = {p.dtype for group in groups for p in group["params"] if p.requires_grad}
    return {config.dtype_of(dtype) for dtype in own.intersection(MANAGED_DTYPES)}


def _warm_up(
    optimizer: ManagedOptimizer | None, config: GeminiConfig, devices: set[torch.device], dtypes: set[torch.dtype]
) -> None:
    for dtype in dtypes if optimizer is not None else ():
        for device in devices:
            assert optimizer is not None
            warm_up(optimizer.rules, optimizer.param_groups, device, dtype, config.split_master)


def _decide(
    model: nn.Module, optimizer: ManagedOptimizer | None, config: GeminiConfig, capacities: Capacities
) -> Packing:
    rules = optimizer.rules if optimizer is not None else OneRule(ADAM)
    param_groups: Sequence[dict[str, Any]] = optimizer.param_groups if optimizer is not None else ()
    left = beside_activations(config, capacities)

    def slots_of(group: Mapping[str, Any]) -> tuple[BufferSpec, ...]:
        return rules.of_group(group).slots(group)

    def is_whole(group: Mapping[str, Any]) -> bool:
        return rules.of_group(group).is_whole

    try:
        packing = decide(model, param_groups, config, left, slots_of, is_whole)
    except OutOfMemory:
        if left is capacities:
            raise
        packing = decide(model, param_groups, config, capacities, slots_of, is_whole)
    warn_of_other_dtypes(packing, config.precision)
    return packing


def _install(model: nn.Module, optimizer: ManagedOptimizer | None, state: Boosted, queue: UpdateQueue) -> GeminiModule:
    """Make the model a `GeminiModule`, and the optimizer one that hands its work over."""
    guard_parts(model, state.manager)
    mix_in(model)
    enrol(state.manager)
    assert isinstance(model, GeminiModule)
    model.__dict__["_gemini"] = state  # not setattr, which a compiled model hands on to the one it wraps
    if optimizer is not None:
        for parameter in state.packing.parameters:
            kept = state.step.kept
            if kept.keeps(parameter) and (saved := optimizer.state.pop(parameter, None)) is not None:
                kept.begin(parameter, given_state(saved))
        bind_optimizer(state, optimizer)
    end = weakref.finalize(model, _close, queue, state.manager, state.saving, state.telemetry)
    state.attached.callback(end)
    state.attached.callback(state.hooks.remove)
    for hook in serve_parts(model, state.values):
        state.attached.callback(hook.remove)
    return model


def _close(queue: UpdateQueue, manager: ChunkManager, saving: Saving, telemetry: TelemetryWriter | None) -> None:
    """When the model is gone: end threads, give the disk file back, end the telemetry."""
    dismiss(manager)
    saving.close()
    if telemetry is not None:
        telemetry.close()
    manager.together.communicator.leave(partial(_free, queue, manager))


def _free(queue: UpdateQueue, manager: ChunkManager) -> None:
    queue.close()
    manager.close()
