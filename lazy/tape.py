"""The tape: what has been done to lazy tensors, as plain data.

A *storage* is a piece of memory that will exist at replay, a *value* one view of it, a *record* one aten call in which
every tensor argument has been replaced by its value. Values never change; a tensor object that is re-pointed (``p.data
= q``, ``t_()``) takes another value. In-place ops write storages. So aliasing needs no special cases: a record names
values, values name storages, and liveness is asked per storage.

Records hold no tensor objects of the user, so a tape dies with the last lazy tensor made on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from .rng import GeneratorLog, SeedPoint, fingerprint


class Storage:
    """Memory that will exist at replay. Identity is all it has."""

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One view of a storage, as one record made it."""

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    covers: bool
    """Whether the view reaches every byte of its storage."""
    creator: int
    """Index of the record that returns it."""
    position: int
    """Which of that record's outputs it is."""


class Kind(Enum):
    """The effect of a record on memory."""

    VIEW = auto()
    """Returns other views of its inputs' storages; moves no data."""
    COMPUTE = auto()
    """Writes storages: those it creates, those it mutates, or both."""
    SEED = auto()
    """A generator was moved outside of the tape."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One aten call, or a source (`call` returns a constant, or what a file holds), or a seed point."""

    kind: Kind
    call: Callable[..., Any] | None = None
    args: Any = ()
    kwargs: Any = None
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value | None, ...] = ()
    """The flat tensor outputs; None where the call returns one of its own inputs."""
    reads: frozenset[Storage] = frozenset()
    """Storages whose content matters to the call."""
    writes: frozenset[Storage] = frozenset()
    """Storages whose content the call changes, those it creates included."""
    kills: frozenset[Storage] = frozenset()
    """The part of `writes` whose content before the call no longer matters."""
    generator: torch.Generator | None = None
    """The generator that it draws from; None for a deterministic call."""
    scratch: Value | None = None
    """The tensor that a draw fills, if its effect on the generator depends on that geometry alone: another will do."""
    dtype: torch.dtype = torch.float32
    """The default dtype at the time of the call: it decides type promotion."""
    seed: SeedPoint | None = None

    @property
    def is_source(self) -> bool:
        """Whether the record is deterministic and needs no tensor, so that it may run at any time."""
        return self.kind is Kind.COMPUTE and not self.inputs and self.generator is None


class Tape:
    """Records in program order, shared by every lazy tensor made from each other."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.generators = GeneratorLog()
        self.is_paused = False
        """True while we run ops for ourselves, which the context's modes must then let through."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which ops are let through instead of recorded."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def note_states(self, generators: Iterable[torch.Generator]) -> None:
        """Record a seed point with the state that each generator has now."""
        for generator in generators:
            seed = SeedPoint(generator, generator.get_state(), None)
            self.records.append(Record(kind=Kind.SEED, generator=generator, seed=seed))

    def note_seed(self, generator: torch.Generator) -> None:
        """Record a seed point if `generator` is not where the last record left it."""
        seed = self.generators.observe(generator)
        if seed is not None:
            self.records.append(Record(kind=Kind.SEED, generator=generator, seed=seed))

    def settle(self) -> None:
        """Record that a generator has been put back to where an earlier record left it (the end of ``fork_rng``)."""
        for generator in self.generators.generators():
            seed = self.generators.recall(generator)
            if seed is not None:
                self.records.append(Record(kind=Kind.SEED, generator=generator, seed=seed))

    def fingerprint(self) -> str:
        """Return what tells apart tapes that will draw different numbers."""
        states = [record.seed.state for record in self.records if record.seed is not None]
        return fingerprint([state for state in states if state is not None])

    def append_source(self, call: Callable[[], Tensor], geometry: Tensor, device: torch.device) -> Value:
        """Add a record that takes its tensor from elsewhere: `call` returns memory of its own each time."""
        storage = Storage(geometry.untyped_storage().nbytes())
        value = describe(geometry, storage, device, len(self.records), 0)
        self.records.append(
            Record(
                kind=Kind.COMPUTE,
                call=call,
                outputs=(value,),
                writes=frozenset((storage,)),
                kills=frozenset((storage,)),
            )
        )
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A real tensor that met lazy ones. Each replay gets its own copy, because it may write into it."""

    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor.clone()


def describe(meta: Tensor, storage: Storage, device: torch.device, creator: int, position: int) -> Value:
    """Return the value with the geometry of `meta`."""
    nbytes = meta.numel() * meta.element_size()
    return Value(
        storage, tuple(meta.shape), meta.stride(), meta.dtype, device,
        covers=nbytes == storage.nbytes and _is_dense(meta.shape, meta.stride()),
        creator=creator, position=position,
    )  # fmt: skip


def _is_dense(shape: Iterable[int], stride: Iterable[int]) -> bool:
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True
