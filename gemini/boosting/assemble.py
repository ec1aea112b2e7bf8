"""The engine over chunks that are filled: its parts, the optimizer's step, and the hooks that call it."""

import torch
from torch import nn

from ..activations import Saving
from ..boosted import Boosted
from ..chunk import ChunkManager
from ..config import GeminiConfig
from ..engine import Engine, Listener
from ..engine.device_room import DeviceRoom
from ..engine.home_room import HomeRoom
from ..engine.memory import Memory
from ..engine.pacing import Pacing
from ..engine.sampling import Sampling
from ..memory.capacity import Capacities
from ..memory.tracker import NonModelMeter
from ..monitor.decided import Decided
from ..monitor.monitor import Monitor, Silent
from ..monitor.stats import Statistics
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.adam_rule import ADAM
from ..nn.optimizer.rules.rules import OneRule
from ..packing.packing import Packing
from ..runtime.arrivals import watch_gradients
from ..runtime.backward import BackwardHooks
from ..runtime.forward import ForwardHooks
from ..runtime.outside import Outside
from ..runtime.tenancy import Tenancy
from ..step.kept_states import KeptStates
from ..step.managed_step import ChunkedStep
from ..step.state_id import StateId
from ..step.unfreezing import Unfreezing
from ..units.units import Units
from ..updates.ahead import Ahead, NothingAhead, UpdatesAhead
from ..updates.completion import Completion
from ..updates.during_backward import DuringBackward
from ..updates.gradients import ConsumedGradients, Gradients, ScaledGradients
from ..updates.options import Options
from ..updates.scaler import LossScaler
from ..updates.scaling import Scaling
from ..updates.schedule import AfterBackward, UpdateSchedule, WhenComplete
from ..updates.update_queue import UpdateQueue
from ..updates.updater import Updater
from ..updates.updates import Updates
from ..updates.values import Values
from .agreement import agree_origin
from .seating import Seating


def assemble(
    model: nn.Module,
    optimizer: ManagedOptimizer | None,
    config: GeminiConfig,
    capacities: Capacities,
    packing: Packing,
    manager: ChunkManager,
    queue: UpdateQueue,
    meter: NonModelMeter,
    saving: Saving,
    seating: Seating,
) -> Boosted:
    """Make the engine and what calls it; from now on the model's modules and parameters have hooks."""
    origin = agree_origin(manager.together.communicator)
    scaler = LossScaler(**config.scaler) if config.precision == "fp16" else None
    scaling = Scaling(manager, scaler, config.max_norm)
    schedule: UpdateSchedule = AfterBackward()
    gradients = Gradients(manager) if scaler is None else ScaledGradients(manager)
    updater = Updater(manager, queue)
    ahead: Ahead = NothingAhead()
    if config.update_in_backward and optimizer is not None:
        schedule, gradients = DuringBackward(manager, Completion(manager)), ConsumedGradients(manager)
    elif optimizer is not None and _may_update_ahead(config, manager):
        schedule = WhenComplete(Completion(manager))
        ahead = UpdatesAhead(manager, gradients, updater, queue)
    values = Values(manager, schedule)
    options = Options.of(optimizer) if optimizer is not None else None
    updates = Updates(manager, schedule, gradients, updater, ahead, scaling, options)

    units, statistics = Units(model, manager), Statistics(manager, saving.counts)
    listener: Listener = Silent(statistics)
    if config.telemetry is not False:
        listener = Monitor(Decided.of(model, config, capacities), packing, manager, units.all, statistics)
    pacing, room = Pacing(manager, units, config.max_prefetch), DeviceRoom(manager, capacities.device_limit_bytes)
    homes, sampling = HomeRoom(manager, gradients, pacing, config, packing), Sampling(manager, meter, saving.counts)
    memory = Memory(manager, room, homes, pacing, sampling, listener, saving)
    engine = Engine(manager, units, updates, pacing, room, memory, sampling, listener)

    kept = KeptStates(values, optimizer.rules if optimizer is not None else OneRule(ADAM), updater)
    unfreezing = Unfreezing(engine, config)
    state_id = StateId(origin, lambda: engine.step.number)
    step = ChunkedStep(engine, updater, updates, unfreezing, kept, state_id)

    watch_gradients(engine, packing.parameters)
    backward = BackwardHooks(engine)
    inputs = None if config.compute_dtype is torch.float32 else config.compute_dtype
    tenancy = Tenancy(engine, seating.budget, seating.seat)
    seating.occupy(tenancy)
    force_fp32 = config.force_outputs_fp32
    hooks = ForwardHooks(model, engine, backward, saving, tenancy, cast_inputs=inputs, force_outputs_fp32=force_fp32)
    outside = Outside(engine, backward)
    return Boosted(
        type(model), config, capacities, manager, values, engine, tenancy, hooks, outside, step, statistics, saving
    )


def _may_update_ahead(config: GeminiConfig, manager: ChunkManager) -> bool:
    """True if there is a disk that would be idle in backward, and steps are not sure to need all gradients first."""
    is_alone = config.communicator.owner.is_alone
    return manager.disk is not None and is_alone and config.precision != "fp16" and not config.max_norm
