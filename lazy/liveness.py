"""Which records of a tape matter for which storages: a pure function of the tape.

Models initialise most parameters twice (a layer's own default, then the model's ``_init_weights``). Walking the tape
backwards from the storages that are wanted, a record is needed if it writes a storage whose content is still asked for;
a record that fills a storage without reading it ends the asking. What is left over is skipped, except that draws must
advance their generator as they did in eager: those run on a scratch tensor. A seed point with a known state ends the
asking for a generator in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch

from .tape import Kind, Record, Storage, Value


class Role(Enum):
    """The part of a record in a replay that does not skip it."""

    RUN = auto()
    """Its effect is needed."""
    SCRATCH = auto()
    """Only its effect on the generator is needed."""
    SEED = auto()
    """Moves a generator."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The records that a replay runs."""

    roles: dict[int, Role]
    """Index of a record -> its role, in program order; other records are skipped."""
    uses: dict[Storage, int]
    """Storage -> how many of the records to run touch it."""
    marks: frozenset[int]
    """Records after which the state of their generator is needed again later."""
    draws: bool
    """True if the wanted content depends on random numbers."""


def plan_replay(records: Sequence[Record], targets: Iterable[Value], advance: Iterable[torch.Generator] = ()) -> Plan:
    """Decide what to run for the content of `targets`.

    Parameters
    ----------
    records : sequence of Record
        The tape.
    targets : iterable of Value
        The values that are wanted as they are after the last record.
    advance : iterable of torch.Generator
        Generators that shall end where the tape leaves them, whether or not a target needs it.
    """
    wanted = {value.storage for value in targets}
    asked = set(advance)  # generators whose state before the present record matters
    marks: set[int] = set()
    roles: dict[int, Role] = {}
    draws = False
    for index in range(len(records) - 1, -1, -1):
        if not wanted and not asked and not marks:
            break
        record = records[index]
        if index in marks and record.generator is not None:
            asked.add(record.generator)
        if record.kind is Kind.VIEW:
            continue  # made on demand
        if record.seed is not None:
            if record.seed.generator in asked:
                asked.remove(record.seed.generator)
                roles[index] = Role.SEED
                if record.seed.after is not None:
                    marks.add(record.seed.after)
            continue
        needed = not wanted.isdisjoint(record.writes)
        if not needed:
            if record.generator not in asked:
                continue
            if record.scratch is not None:
                roles[index] = Role.SCRATCH
                continue
            # How far it moves the generator may depend on what it reads, so it runs in full.
        roles[index] = Role.RUN
        if record.generator is not None:
            asked.add(record.generator)
            draws |= needed
        wanted -= record.kills
        wanted |= record.reads
    roles = dict(sorted(roles.items()))
    return Plan(roles, _uses(records, roles), frozenset(marks), draws)


def touched(record: Record) -> set[Storage]:
    """Storages that must exist while the record runs."""
    return {value.storage for value in record.inputs} | record.writes


def _uses(records: Sequence[Record], roles: dict[int, Role]) -> dict[Storage, int]:
    uses: dict[Storage, int] = {}
    for index, role in roles.items():
        if role is Role.RUN:
            for storage in touched(records[index]):
                uses[storage] = uses.get(storage, 0) + 1
    return uses
