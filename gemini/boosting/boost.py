"""Boosting a model: from a plain (or lazy) module and its optimizer to chunks, hooks and a managed step."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..boosted import Boosted
from ..checkpoint import serve_parts
from ..chunk import (
    FETCH_WORKERS,
    MASTER,
    STORE_BLOCKS,
    AcceleratorBackend,
    Chunk,
    ChunkManager,
    DeviceBackend,
    DiskBackend,
    Ledger,
    RamBackend,
    Staging,
    Tier,
    driver_of,
    tuned,
    write_slot,
)
from ..config import GeminiConfig
from ..engine import Engine, Listener
from ..engine.device_room import DeviceRoom
from ..engine.pacing import Pacing
from ..engine.sampling import Sampling
from ..lazy import is_lazy, materialize
from ..memory.capacity import Capacities, device_headroom, find_capacities
from ..memory.tracker import NonModelMeter
from ..monitor.monitor import Decided, Monitor, Silent, model_facts, probes
from ..monitor.stats import Statistics, Stats
from ..nn.optimizer.adam_rule import ADAM
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import Packing, decide, managed_parameters
from ..process_wide import bound_kernels, return_freed_memory
from ..runtime.arrivals import watch_gradients
from ..runtime.backward import BackwardHooks
from ..runtime.forward import ForwardHooks
from ..runtime.outside import Outside
from ..step.kept_states import KeptStates
from ..step.managed_step import ChunkedStep
from ..step.scaler import LossScaler
from ..step.unfreezing import Unfreezing
from ..telemetry.writer import TelemetryWriter
from ..torch_private import own_buffers
from ..units.units import Units
from ..updates.completion import Completion
from ..updates.during_backward import DuringBackward
from ..updates.gradients import ConsumedGradients, Gradients, ScaledGradients
from ..updates.options import Options
from ..updates.schedule import AfterBackward, UpdateSchedule
from ..updates.update_pipeline import BLOCK_SETS
from ..updates.update_queue import UpdateQueue, warm_up
from ..updates.updater import Updater
from ..updates.updates import Updates
from ..updates.values import Values
from .alive import enrol
from .dtypes import warn_of_other_dtypes
from .mixing import mix_in
from .module import GeminiModule
from .parameter_data import give_data
from .parts import guard_parts
from .refusals import refuse_model, refuse_optimizer, refuse_split_master
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
    OutOfMemory, OffloadError, ValueError
        If it cannot work. Model and optimizer are as they were before then.
    """
    refuse_model(model)
    if optimizer is not None:
        refuse_optimizer(model, optimizer)
    if config.split_master:
        refuse_split_master(model, optimizer)
    param_groups: Sequence[dict[str, Any]] = optimizer.param_groups if optimizer is not None else ()
    if optimizer is not None:
        warm_up(optimizer.rule, param_groups, torch.device("cpu"), config.compute_dtype, config.split_master)
    capacities = find_capacities(config)
    bound_kernels()
    packing = decide(model, param_groups, config, capacities, (optimizer.rule if optimizer is not None else ADAM).slots)
    warn_of_other_dtypes(packing, config.precision)
    manager, queue = _build(packing, config, capacities)
    if packing.full_copies_limit_bytes is not None:
        on_device = manager.ledger.used(Tier.DEVICE)
        manager.ledger.resize(
            Tier.DEVICE, min(on_device + packing.full_copies_limit_bytes, capacities.nbytes[Tier.DEVICE])
        )

    device = capacities.device
    if optimizer is not None:
        for dtype in {plan.compute_dtype for plan in packing.plans if plan.is_trainable}:
            for where in {device, torch.device("cpu")}:
                warm_up(optimizer.rule, param_groups, where, dtype, config.split_master)
    meter = NonModelMeter(device)
    if manager.device.is_ram:
        return_freed_memory()  # else values of a moment stay on malloc's heap, between small objects that live on
    _fill(model, packing, manager, device)
    if optimizer is not None:
        _take_over_states(optimizer, manager)

    scaler = LossScaler(**config.scaler) if config.precision == "fp16" else None
    schedule: UpdateSchedule = AfterBackward()
    gradients = Gradients(manager) if scaler is None else ScaledGradients(manager)
    if config.update_in_backward and optimizer is not None:
        schedule, gradients = DuringBackward(manager, Completion(manager)), ConsumedGradients(manager)
    updater, values = Updater(manager, queue), Values(manager, schedule)
    options = Options.of(optimizer) if optimizer is not None else None
    updates = Updates(manager, schedule, gradients, updater, options)
    units, statistics = Units(model, manager), Statistics(manager)
    listener = _listener(model, config, capacities, packing, manager, statistics, units)
    pacing, room = Pacing(manager, config.max_prefetch), DeviceRoom(manager, capacities.device_limit_bytes)
    engine = Engine(manager, units, updates, pacing, room, Sampling(manager, meter), listener)
    watch_gradients(engine, packing.parameters)
    unfreezing = Unfreezing(engine, config, packing)
    kept = KeptStates(values, optimizer.rule if optimizer is not None else ADAM, updater)
    communicator, max_norm = config.communicator, config.max_norm
    step = ChunkedStep(manager, engine, updater, updates, communicator, scaler, max_norm, unfreezing, kept)
    backward = BackwardHooks(engine)
    hooks = ForwardHooks(
        model,
        engine,
        backward,
        cast_inputs=config.compute_dtype if config.precision != "fp32" else None,
        force_outputs_fp32=config.force_outputs_fp32,
    )
    outside = Outside(engine, backward)
    state = Boosted(type(model), config, capacities, manager, values, engine, hooks, outside, step, statistics)
    serve_parts(model, values)
    guard_parts(model, manager)
    mix_in(model)
    enrol(manager)
    assert isinstance(model, GeminiModule)
    model.__dict__["_gemini"] = state  # not setattr, which a compiled model hands on to the one it wraps
    if optimizer is not None:
        for parameter in packing.parameters:
            if kept.keeps(parameter) and (saved := optimizer.state.pop(parameter, None)) is not None:
                kept.begin(parameter, _real(saved))
        bind_optimizer(state, optimizer)
    weakref.finalize(model, _close, queue, manager, state.telemetry)
    if manager.device.is_ram:
        return_freed_memory()  # so that what malloc kept of the building is no part of where the measurement begins
    meter.start()
    return model


def _build(packing: Packing, config: GeminiConfig, capacities: Capacities) -> tuple[ChunkManager, UpdateQueue]:
    ledger = Ledger(capacities.nbytes, capacities.memory)
    disk = fetch_staging = store_staging = update_staging = None
    if packing.staging_block_numel:
        assert config.offload_dir is not None
        requests = tuned(config.offload_dir, packing.placement.nbytes[Tier.DISK])
        disk = DiskBackend(config.offload_dir, ledger, requests, checksums=config.disk_checksums)
        pin = capacities.device.type != "cpu" and config.pin_memory
        fetch_staging = Staging(FETCH_WORKERS, packing.staging_block_numel, pin)
        store_staging = Staging(STORE_BLOCKS, packing.staging_block_numel, pin)
        update_staging = Staging(BLOCK_SETS * packing.updated_buffer_count, packing.staging_block_numel, pin)
        ledger.take(Tier.HOST, packing.staging_bytes, "staging for the disk tier")
    device: DeviceBackend
    if capacities.device.type == "cpu":
        device = RamBackend(fetch_staging, store_staging)
    else:
        device = AcceleratorBackend(driver_of(capacities.device), fetch_staging, config.pin_memory, store_staging)
    headroom = partial(device_headroom, capacities.device)
    manager = ChunkManager(
        packing.plans, ledger, device, disk, packing.placement.gradient_room, headroom, config.communicator
    )
    return manager, UpdateQueue(update_staging)


def _fill(model: nn.Module, packing: Packing, manager: ChunkManager, device: torch.device) -> None:
    """Values into homes, one parameter at a time; then every parameter follows its chunk."""
    places: dict[int, tuple[Chunk, int]] = {}
    for chunk in manager.chunks:
        for position, slot in enumerate(chunk.layout.slots):
            places[id(packing.parameters[slot.key])] = (chunk, position)

    def write(parameter: Tensor, value: Tensor) -> Tensor:
        place = places.get(id(parameter))
        if place is None:
            return value.to(device)
        write_slot(*place, MASTER, value)
        return torch.full((), float("nan"), dtype=value.dtype, device=device).expand(value.shape)

    lazy = {id(p) for p in model.parameters() if is_lazy(p)}
    materialize(model, write)
    for parameter in model.parameters():
        if id(parameter) not in lazy:
            give_data(parameter, write(parameter, parameter.data))
    for parameter in packing.parameters:
        manager.bind(parameter, *places[id(parameter)])
    if device.type != "cpu":
        for module in model.modules():
            for name, buffer in own_buffers(module).items():
                if buffer is not None:
                    own_buffers(module)[name] = buffer.to(device)


def _take_over_states(optimizer: ManagedOptimizer, manager: ChunkManager) -> None:
    """An optimizer that has stepped before goes on where it was; one that starts with states gets them."""
    if optimizer.rule.starts_filled:
        for chunk in manager.chunks:
            for slot in chunk.states:
                for position in range(len(chunk.layout.slots)):
                    write_slot(
                        chunk,
                        position,
                        slot.name,
                        torch.full((), optimizer.rule.initial(slot.name), dtype=torch.float32, device="cpu"),
                    )
    for parameter, saved in optimizer.state.items():
        place = manager.find(parameter)
        if place is None or not place[0].is_trainable:
            continue
        for name in place[0].codecs:
            if _real(saved).get(name) is not None:
                write_slot(*place, name, saved[name])


def _real(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state; one that an optimizer made inside ``LazyInitContext`` is what it is before the first step: nothing."""
    return {} if any(is_lazy(value) for value in saved.values() if isinstance(value, Tensor)) else saved


def _listener(
    model: nn.Module,
    config: GeminiConfig,
    capacities: Capacities,
    packing: Packing,
    manager: ChunkManager,
    statistics: Statistics,
    units: Units,
) -> Listener:
    if config.telemetry is False:
        return Silent(statistics)
    facts = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in managed_parameters(model).values()),
        "precision": config.precision,
        "placement_policy": type(config.policy).__name__,
        "chunk_numel": max((plan.layout.numel for plan in packing.plans), default=0),
        "capacities": {tier.value: budget.source for tier, budget in capacities.budgets.items()},
        "offload_dir": str(config.offload_dir) if config.offload_dir is not None else None,
    }
    folder = config.telemetry if isinstance(config.telemetry, Path) else None

    def writer(last: Callable[[], Stats | None]) -> TelemetryWriter:
        return TelemetryWriter(folder, rank=0, facts=facts, probes=probes(manager), last=last)

    decided = Decided(config, capacities, model_facts(model))
    return Monitor(writer, manager, units.all, statistics, decided, packing)


def _close(queue: UpdateQueue, manager: ChunkManager, telemetry: TelemetryWriter | None) -> None:
    """When the model is gone: end threads, give the disk file back, end the telemetry."""
    queue.close()
    manager.close()
    if telemetry is not None:
        telemetry.close()
