"""Which records of a tape matter for which storages: a pure function of the tape.

Models initialise most parameters twice (a layer's own default, then the model's ``_init_weights``). Walking the tape backwards from
the storages that are wanted, a record is needed if it writes a storage whose content is still asked for; a record that
fills a storage without reading it ends the asking. What is left over is skipped, except that draws must advance their
generator as they did in eager: those run on a scratch tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from .tape import Kind, Record, Storage, Value


class Role(Enum):
    """What a replay does with a record."""

    SKIP = auto()
    """Nobody needs it."""
    RUN = auto()
    """Its effect is needed."""
    SCRATCH = auto()
    """Only its effect on the generator is needed."""
    SEED = auto()
    """Moves a generator."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay does, record by record."""

    roles: list[Role]
    uses: dict[Storage, int]
    """Storage -> how many of the records to run touch it."""


def plan_replay(records: Sequence[Record], targets: Iterable[Value], *, all_draws: bool) -> Plan:
    """Decide what to run for the content of `targets`.

    Parameters
    ----------
    records : sequence of Record
        The tape.
    targets : iterable of Value
        The values that are wanted as they are after the last record.
    all_draws : bool
        Whether the generators shall end where the whole tape leaves them. Otherwise draws after the last needed one, or all if
        none is needed, are left out.
    """
    wanted = {value.storage for value in targets}
    roles = _walk(records, wanted, last_draw=-1)
    if all_draws:
        last = len(records) - 1
    else:
        last = max((i for i, role in enumerate(roles) if role is Role.RUN and _draws(records[i])), default=-1)
    if last >= 0:
        roles = _walk(records, wanted, last)
    uses: dict[Storage, int] = {}
    for i, role in enumerate(roles):
        if role is Role.RUN:
            for storage in touched(records[i]):
                uses[storage] = uses.get(storage, 0) + 1
    return Plan(roles, uses)


def touched(record: Record) -> set[Storage]:
    """Storages that must exist while the record runs."""
    return {value.storage for value in record.inputs} | record.writes


def _draws(record: Record) -> bool:
    return record.kind is Kind.COMPUTE and record.generator is not None


def _walk(records: Sequence[Record], targets: set[Storage], last_draw: int) -> list[Role]:
    """Draws up to `last_draw` keep their effect on the generator; dead ones after it are skipped."""
    wanted = set(targets)
    roles = [Role.SKIP] * len(records)
    for i in range(len(records) - 1, -1, -1):
        record = records[i]
        if record.kind is Kind.VIEW:
            continue  # made on demand
        if record.kind is Kind.SEED:
            roles[i] = Role.SEED if i <= last_draw else Role.SKIP
            continue
        if wanted.isdisjoint(record.writes):
            if record.generator is None or i > last_draw:
                continue
            if record.scratch is not None:
                roles[i] = Role.SCRATCH
                continue
            # How far it moves the generator may depend on what it reads, so it runs in full.
        roles[i] = Role.RUN
        wanted -= record.kills
        wanted |= record.reads
    return roles
