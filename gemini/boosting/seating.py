"""A place in a budget for a model that is about to be boosted, and the capacities that this gives it."""

from collections.abc import Mapping
from dataclasses import replace
from weakref import ref

from torch import nn

from ..chunk import MemoryMap, Tier
from ..config import GeminiConfig
from ..lease.budget import Budget
from ..lease.folder import LeaseFolder
from ..lease.holder import Holder, LimitsOf, own_standing
from ..lease.limits import disk_limit, ram_limits
from ..lease.part import MachinePart
from ..lease.pressure import PressureGauge
from ..lease.room import room_of
from ..lease.seat import Seat
from ..lease.sharing import Claim
from ..lease.standing import DEVICE, DISK, HOST
from ..memory.capacity import Capacities, find_capacities
from ..memory.tracker import Budget as Found
from ..memory.tracker import device_limit, local_world_size
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import managed_parameters
from ..process_wide import PerProcess
from ..runtime.tenancy import Tenancy
from ..telemetry.job import find_job
from ..telemetry.outcome import program

_budget_of_process = PerProcess(Budget)
"""For models that are given none: those of one process leave each other room."""
_NEARLY_ALL = 0.99
_STAGING_BYTES = 32 << 20
"""Room to work that a model with a disk tier needs at least, by experience; what it really needs is told once built."""


class Seating:
    """Finds a model its place.

    Parameters
    ----------
    config
        What the user asked for.
    """

    def __init__(self, config: GeminiConfig) -> None:
        self.budget = config.budget or _budget_of_process.get()
        self.seat = Seat({}, {})
        said = self.budget.said
        self._own = {memory: nbytes for memory, nbytes in _said(config).items() if nbytes is not None}
        self.config = replace(
            config,
            host_memory=config.host_memory or said.get(HOST),
            device_memory=config.device_memory or said.get(DEVICE),
            disk_memory=config.disk_memory or (said.get(DISK) if config.offload_dir is not None else None),
        )
        """With what the budget says where the user said nothing of this model."""

    def take(self, model: nn.Module, optimizer: ManagedOptimizer | None, capacities: Capacities) -> Capacities:
        """Join the budget: others make room, and the capacities are what this model has then.

        Waits up to a minute for other runs to give back what this one may have.
        """
        claims = _claims(model, optimizer, self.config, capacities)
        self.seat = Seat(claims, {memory: n for memory, n in self._own.items() if memory in claims})
        found = capacities

        def measured() -> Mapping[str, int]:
            nonlocal found
            found = find_capacities(self.config)
            return _by_memory(found)

        shares = self.budget.join(self.seat, measured, _limits(capacities, self.config), _part)
        return _with_shares(found, shares)

    def occupy(self, tenancy: Tenancy) -> None:
        """The model is built."""
        self.seat.occupy(ref(tenancy))
        self.budget.settled()

    def leave(self) -> None:
        """The model is gone, or was not built. Idempotent."""
        self.budget.leave(self.seat)


def _said(config: GeminiConfig) -> dict[str, int | None]:
    return {HOST: config.host_memory, DEVICE: config.device_memory, DISK: config.disk_memory}


def _by_memory(capacities: Capacities) -> dict[str, int]:
    return {pool.value: capacities.nbytes[pool] for pool in capacities.memory.pools if capacities.nbytes[pool]}


def _with_shares(capacities: Capacities, shares: Mapping[str, int]) -> Capacities:
    """The capacities of a model that is not alone."""
    budgets, limit, ram = dict(capacities.budgets), capacities.device_limit_bytes, capacities.ram_bytes
    for memory, nbytes in shares.items():
        tier = Tier(memory)
        before = budgets[tier]
        if nbytes >= before.bytes * _NEARLY_ALL:
            continue
        budgets[tier] = Found(nbytes, f"{before.source}, of which other models and runs have a share")
        if tier is Tier.DEVICE and limit is not None:
            limit = limit * nbytes // before.bytes
        elif tier is Tier.HOST:
            ram = min(ram, room_of(nbytes))
            if capacities.memory is MemoryMap.UNIFIED:
                budgets[Tier.DEVICE] = Found(nbytes, f"the same RAM as host: {budgets[tier].source}")
    return replace(capacities, budgets=budgets, device_limit_bytes=limit, ram_bytes=ram)


def _claims(
    model: nn.Module, optimizer: ManagedOptimizer | None, config: GeminiConfig, capacities: Capacities
) -> dict[str, Claim]:
    """What a model will ask for, from its parameters: before it is packed nothing more is known."""
    homes = copies = 0
    states = _state_bytes(optimizer)
    parameters = managed_parameters(model).values()
    for parameter in parameters:
        low = config.dtype_of(parameter.dtype).itemsize
        homes += parameter.numel() * (4 + states[id(parameter)] + low if id(parameter) in states else low)
        copies += parameter.numel() * low
    has_disk = config.offload_dir is not None
    least = _STAGING_BYTES + 2 * max((_own_bytes(module, config) for module in model.modules()), default=0)
    ram = homes + (copies if capacities.memory is MemoryMap.UNIFIED else 0)
    claims = {HOST: Claim(floor=min(least, ram) if has_disk else ram, wish=ram)}
    if has_disk:
        claims[DISK] = Claim(floor=0, wish=homes)
    if capacities.memory is not MemoryMap.UNIFIED:
        claims[DEVICE] = Claim(floor=min(least, homes + copies), wish=homes + copies)
    return claims


def _state_bytes(optimizer: ManagedOptimizer | None) -> dict[int, int]:
    """What the optimizer keeps for each element, by the id of the parameter."""
    found: dict[int, int] = {}
    if optimizer is not None:
        for group in optimizer.param_groups:
            nbytes = sum(
                -(-spec.dtype.itemsize // spec.block_numel) for spec in optimizer.rules.of_group(group).slots(group)
            )
            found |= {id(p): nbytes for p in group["params"] if p.requires_grad}
    return found


def _own_bytes(module: nn.Module, config: GeminiConfig) -> int:
    return sum(p.numel() * config.dtype_of(p.dtype).itemsize for p in module.parameters(recurse=False))


def _limits(capacities: Capacities, config: GeminiConfig) -> dict[str, LimitsOf]:
    """What bounds each memory on this machine."""
    found: dict[str, LimitsOf] = {HOST: ram_limits}
    if config.offload_dir is not None:
        folder = config.offload_dir
        found[DISK] = lambda: [disk_limit(folder)]
    if capacities.memory is MemoryMap.ACCELERATOR:
        found[DEVICE] = lambda: [device_limit(capacities.device)]
    return found


def _part() -> MachinePart:
    job = find_job()
    standing = own_standing(job.run_id or program(), program(), job.rank, local_world_size())
    return MachinePart(Holder({}, standing, LeaseFolder()), PressureGauge())
