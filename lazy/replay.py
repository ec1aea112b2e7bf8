"""Runs a plan: every tensor exists from the first record that needs it to the last.

Draws run in program order. Deterministic records run as early as their inputs allow once one of their inputs has been
written: ``model.half()`` after the context puts all its casts at the end of the tape, and in program order the whole
fp32 model would be alive by then. Views, allocations and records without inputs (``zeros``) run when something asks for
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from gemini.torch_private import tree_leaves, tree_map

from .liveness import Plan, Role, plan_replay, touched
from .memory import Pool, empty
from .tape import Kind, Record, Storage, Tape, Value

Resolve = Callable[[Value], Tensor]
Deliver = Callable[[Storage, Resolve], None]

_SKIP_FROM_NUMEL = 1 << 12  # a copy of the generator's state costs more than a shorter draw
_COMPILE_FROM_NUMEL = 1 << 22  # loading the compiled code costs more than fewer draws


class Replay:
    """One run over a tape. Leaves the generators where the run leaves them.

    Parameters
    ----------
    tape : Tape
        What to replay; it is not changed.
    targets : list of Value
        What is wanted.
    deliver : callable
        ``deliver(storage, resolve)`` is called once for each storage of `targets`, when it has its final content;
        ``resolve(value)`` gives the real views. The storage is let go of right after.
    advance : iterable of torch.Generator
        See :func:`plan_replay`.
    transient : bool
        Whether values are freed soon after they have been delivered.
    """

    def __init__(
        self,
        tape: Tape,
        targets: list[Value],
        deliver: Deliver,
        advance: Iterable[torch.Generator] = (),
        *,
        transient: bool = False,
    ) -> None:
        self._records = tape.records
        self._plan: Plan = plan_replay(self._records, targets, advance)
        self._uses = self._plan.uses
        self._targets = dict.fromkeys(value.storage for value in targets)
        self._deliver = deliver
        self._transient = transient
        self._pool = Pool()
        self._words = self._find_skips()
        self._live: dict[Storage, dict[Value, Tensor]] = {}
        self._ran: set[int] = set()
        self._after: dict[int, list[int]] = {}
        self._pending: dict[int, int] = {}
        self._states: dict[int, Tensor] = {}

    @property
    def draws(self) -> bool:
        """Whether the targets depend on random numbers."""
        return self._plan.draws

    def run(self) -> None:
        """Run it all."""
        self._order()
        for index, role in self._plan.roles.items():
            record = self._records[index]
            if role is Role.RUN and index not in self._ran:
                if not record.is_source or all(self._uses[storage] == 1 for storage in record.writes):
                    self._run_chain(index)
            elif role is Role.SCRATCH:
                self._scratch(index)
            elif role is Role.SEED:
                self._seed(record)
            if index in self._plan.marks and record.generator is not None:
                self._states[index] = record.generator.get_state()
        for storage in list(self._targets):  # never written: torch.empty
            self._release(storage)

    def _order(self) -> None:
        """Count what each record to run has to wait for: the usual read and write hazards per storage."""
        writer: dict[Storage, int] = {}
        readers: dict[Storage, list[int]] = {}
        for index, role in self._plan.roles.items():
            record = self._records[index]
            if role is not Role.RUN or record.is_source:
                continue
            before: set[int] = set()
            for storage in touched(record):
                if storage in writer:
                    before.add(writer[storage])
                if storage in record.writes:
                    before.update(readers.pop(storage, ()))
                    writer[storage] = index
                else:
                    readers.setdefault(storage, []).append(index)
            self._pending[index] = len(before)
            for earlier in before:
                self._after.setdefault(earlier, []).append(index)

    def _run_chain(self, index: int) -> None:
        stack = [index]
        while stack:
            index = stack.pop()
            self._execute(index)
            for later in self._after.pop(index, ()):
                self._pending[later] -= 1
                if not self._pending[later] and self._records[later].generator is None:
                    stack.append(later)

    def _execute(self, index: int) -> None:
        record = self._records[index]
        self._ran.add(index)
        self._call(record)
        for storage in touched(record):
            self._uses[storage] -= 1
            if not self._uses[storage]:
                self._release(storage)

    def _call(self, record: Record) -> None:
        assert record.call is not None
        args, kwargs = tree_map(self._real, (record.args, record.kwargs or {}))
        leaves = tree_leaves(_call_with_dtype(record.dtype, record.call, args, kwargs))
        for value, leaf in zip(record.outputs, leaves, strict=False):
            if value is not None:
                self._live.setdefault(value.storage, {})[value] = leaf

    def _real(self, leaf: Any) -> Any:
        return self._resolve(leaf) if isinstance(leaf, Value) else leaf

    def _resolve(self, value: Value) -> Tensor:
        """Return the real tensor of a value: made earlier, or a view, or memory to be filled."""
        tensor = self._live.get(value.storage, {}).get(value)
        if tensor is not None:
            return tensor
        index = value.creator
        record = self._records[index]
        if record.kind is Kind.VIEW:
            self._call(record)
        elif record.is_source and index in self._plan.roles and index not in self._ran:
            self._ran.add(index)
            self._call(record)
            self._uses[value.storage] -= 1
        else:  # its content is dead, the memory is not
            assert self._plan.roles.get(index) is not Role.RUN, "a record ran before the one that makes its input"
            self._live.setdefault(value.storage, {})[value] = (
                self._pool.empty(value) if self._transient else empty(value)
            )
        return self._live[value.storage][value]

    def _release(self, storage: Storage) -> None:
        if storage in self._targets:
            del self._targets[storage]
            self._deliver(storage, self._resolve)
        self._live.pop(storage, None)

    def _find_skips(self) -> dict[int, int]:
        """Index of a dead draw -> words to skip instead, for those long enough to be worth it."""
        dead = {
            index: self._records[index]
            for index, role in self._plan.roles.items()
            if role is Role.SCRATCH and _drawn(self._records[index]) >= _SKIP_FROM_NUMEL
        }
        if sum(map(_drawn, dead.values())) < _COMPILE_FROM_NUMEL:
            return {}
        from . import skip

        if not skip.is_reliable():
            return {}
        words = {index: skip.words(record) for index, record in dead.items()}
        return {index: count for index, count in words.items() if count is not None}

    def _scratch(self, index: int) -> None:
        record = self._records[index]
        assert record.call is not None and record.scratch is not None
        if index in self._words:
            from .skip import skip

            assert record.generator is not None
            skip(record.generator, self._words[index])
            return
        scratch = self._pool.empty(record.scratch)
        args, kwargs = tree_map(lambda leaf: scratch if isinstance(leaf, Value) else leaf, (record.args, record.kwargs))
        record.call(*args, **kwargs)

    def _seed(self, record: Record) -> None:
        seed = record.seed
        assert seed is not None
        state = seed.state if seed.after is None else self._states[seed.after]
        assert state is not None, "a seed point is either a state or a mark"
        seed.generator.set_state(state)


def _drawn(record: Record) -> int:
    return prod(record.scratch.shape) if record.scratch is not None else 0


def _call_with_dtype(dtype: torch.dtype, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    current = torch.get_default_dtype()
    if dtype == current:
        return call(*args, **kwargs)
    torch.set_default_dtype(dtype)
    try:
        return call(*args, **kwargs)
    finally:
        torch.set_default_dtype(current)


def read_values(tape: Tape, values: list[Value]) -> list[Tensor]:
    """Return real copies of values as they are now; the generators are put back.

    If random numbers were drawn for it, the states they led to are noted on the tape, so that the next read starts
    there. Rejection sampling (``trunc_normal_``) reads once for each parameter.
    """
    found: dict[Value, Tensor] = {}

    def deliver(storage: Storage, resolve: Resolve) -> None:
        found.update((value, resolve(value)) for value in values if value.storage is storage)

    with undisturbed(tape), keep_generators(tape):
        replay = Replay(tape, values, deliver)
        if replay.draws:
            generators = tape.generators.generators()
            Replay(tape, values, deliver, generators).run()
            tape.note_states(generators)
        else:
            replay.run()
    return [found[value] for value in values]


def generator_state(tape: Tape, generator: torch.Generator) -> Tensor:
    """Return the state that `generator` has after the tape so far."""
    with undisturbed(tape), keep_generators(tape):
        Replay(tape, [], lambda storage, resolve: None, [generator]).run()
        return generator.get_state()


@contextmanager
def keep_generators(tape: Tape) -> Iterator[None]:
    """Put every generator of the tape back at the end."""
    states = [(generator, generator.get_state()) for generator in tape.generators.generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def undisturbed(tape: Tape) -> Iterator[None]:
    """Shield a replay from the caller's modes: recording, grad, inference, autocast."""
    with ExitStack() as stack:
        stack.enter_context(tape.paused())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", torch.accelerator.current_accelerator()):
            if device is not None and torch.is_autocast_enabled(torch.device(device).type):
                stack.enter_context(torch.autocast(torch.device(device).type, enabled=False))
        yield
