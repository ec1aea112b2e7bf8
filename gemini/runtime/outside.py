"""Uses of parameters outside of every unit: between steps, in code of libraries, in methods that are not forward.

A parameter that is away asks here (see [Note: Away]). Its chunk comes for one operation. Where autograd will need it
again, it comes when backward reaches what the operation made: a graph saves a parameter itself, or views of the full
copy, whose storage stays the same object. Memory that outlives the operation is lent (see [Note: Loans]).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..chunk import Chunk, Keeper, announce_change
from ..engine import Engine
from ..signals import uninterrupted
from ..torch_private import is_transformed, next_number, storage_key, without_transforms
from ..units.nested import tensors_in
from .backward import BackwardHooks


class Outside(Keeper):
    """Answers for the parameters of one model while they are away.

    Parameters
    ----------
    engine, backward
        Moves chunks, and has backward bring them again.
    """

    def __init__(self, engine: Engine, backward: BackwardHooks) -> None:
        self._engine = engine
        self._backward = backward
        self._gradients = engine.updates.gradients
        engine.manager.entrust(self)

    def view(self, parameter: Tensor) -> Tensor:
        chunk, position = self._place(parameter)
        return chunk.views[position]

    def use(self, run: Callable[[], Any], parameters: list[Tensor], arguments: list[Tensor]) -> Any:
        with self._engine.lock:
            chunks = self._chunks(parameters)
            with _undisturbed():
                is_in_unit = self._engine.add_to_innermost(chunks, parameters)
                pinned = [] if is_in_unit else self._engine.pins.bring(chunks)
            if is_in_unit:
                self._announce(parameters)
                return run()
            try:
                self._announce(parameters)
                self._remember_upper_halves(parameters)
                begin = next_number()
                result = run()
                self._keep_edits(chunks)
                if _is_memory_of(result, arguments, chunks):
                    return self._lent(run, parameters)
                if torch.is_grad_enabled():
                    self._backward.bring(begin, result, chunks)
                return result
            finally:
                self._engine.pins.let_go(pinned)

    def lend(self, run: Callable[[], Any], parameters: list[Tensor], is_address: bool) -> Any:
        with self._engine.lock:
            chunks = self._chunks(parameters)
            with _undisturbed():
                pinned = self._engine.pins.bring(chunks)
            try:
                self._announce(parameters)
                result = self._lent(run, parameters)
                if is_address:
                    for chunk in chunks:
                        chunk.lend().keep_address()
                return result
            finally:
                self._engine.pins.let_go(pinned)

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        with self._engine.lock, torch.no_grad():
            manager, chunks = self._engine.manager, self._chunks([parameter])
            manager.check_assigned(parameter, value)
            with _undisturbed():
                pinned = self._engine.pins.bring(chunks)
            try:
                manager.assign(parameter, value)
            finally:
                self._engine.pins.let_go(pinned)

    @uninterrupted
    def show_gradient(self, parameter: Tensor) -> None:
        self._gradients.show(parameter)

    @uninterrupted
    def replace_gradient(self, parameter: Tensor, gradient: Tensor | None) -> None:
        self._gradients.replace(parameter, gradient)

    def _announce(self, parameters: list[Tensor]) -> None:
        """Before an operation that may change parameters: those that are their own home."""
        for chunk, position in map(self._place, parameters):
            if chunk.full_is_home:
                announce_change(chunk, position)

    def _remember_upper_halves(self, parameters: list[Tensor]) -> None:
        """Before an operation that may change masters in two halves: what is changed is told by comparing."""
        for chunk, position in map(self._place, parameters):
            if chunk.is_split:
                with _undisturbed():
                    chunk.lend().view(position)

    def _keep_edits(self, chunks: tuple[Chunk, ...]) -> None:
        """Bring home at once what cannot wait: halves of masters, what ranks change together, what will be refused."""
        for chunk in chunks:
            if (chunk.is_split or chunk.is_shared or chunk.rounds) and chunk.bindings.edited():
                with _undisturbed():
                    self._engine.manager.keep_edits(chunk)

    def _lent(self, run: Callable[[], Any], parameters: list[Tensor]) -> Any:
        """Run something with the parameters in the loans' memory; their chunks are pinned."""
        places = [self._place(parameter) for parameter in parameters]
        try:
            with _undisturbed():
                for chunk, position in places:
                    chunk.bindings.point(position, chunk.lend().view(position))
            return run()
        finally:
            for chunk, position in places:
                chunk.bindings.point_back(position)

    def _chunks(self, parameters: list[Tensor]) -> tuple[Chunk, ...]:
        found = {chunk.index: chunk for chunk, _ in map(self._place, parameters)}
        chunks = tuple(found[index] for index in sorted(found))
        self._engine.updates.schedule.check_current("code outside of any unit", chunks)
        return chunks

    def _place(self, parameter: Tensor) -> tuple[Chunk, int]:
        place = self._engine.manager.find(parameter)
        assert place is not None
        return place


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Moving chunks is no part of what the user's modes and transforms change or record."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if is_transformed():
            stack.enter_context(without_transforms())
        yield


def _is_memory_of(result: Any, arguments: list[Tensor], chunks: tuple[Chunk, ...]) -> bool:
    """True if a new tensor in a result lies in one of the full copies."""
    given = {id(tensor) for tensor in arguments}
    storages = {storage_key(chunk.full.untyped_storage()) for chunk in chunks}
    return any(id(tensor) not in given and _storage(tensor) in storages for tensor in tensors_in(result))


def _storage(tensor: Tensor) -> int | None:
    try:
        return storage_key(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse ones, and those of functorch, have none
        return None
