"""Loading an optimizer: its groups and what is stored of the state of each parameter."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from gemini.errors import CheckpointError
from gemini.step.saved_groups import load_options
from gemini.step.state_checks import STEP

from ..match import Source
from ..optimizer_check import checked_saved
from ..optimizer_files import SavedOptimizer
from ..tensor_parallel import whole_shape
from .pieces import OURS, Contents, Piece, Seat
from .reads import Arrivals, read_object
from .stored import StoredOptimizer, form_of, is_ours

_SMALL_BYTES = 1 << 26
"""What is no value for each element of a parameter is read before the check, and is not larger than this."""


class OptimizerLoad:
    """An optimizer that is loaded.

    Parameters
    ----------
    contents
        Of the optimizer and its model.
    metadata
        What is stored.
    folder
        Where, for messages.

    Raises
    ------
    CheckpointError
        If there is no state of an optimizer. Nothing has been changed.
    """

    def __init__(self, contents: Contents, metadata: Metadata, folder: Path) -> None:
        assert contents.optimizer is not None
        if contents.optimizer.has_load_state_dict_pre_hooks:
            raise CheckpointError(
                f"{folder}: the optimizer has hooks that are to see what is loaded before it is, which is not gathered "
                "here: remove them, or use booster.save_optimizer and load_optimizer"
            )
        self._contents = contents
        self._optimizer = contents.optimizer
        self._metadata = metadata
        self._folder = folder
        self._stored = StoredOptimizer.of(metadata, folder)
        self._values: dict[str, Any] = {}
        """What is read before the check."""
        self._names: list[str] = []
        """Of the parameters of the saved optimizer, in its order."""
        self._saved: SavedOptimizer | None = None
        self._parameters = {
            name: parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            for name in contents.names(parameter)
        }

    # -- reading

    def small(self, arrivals: Arrivals) -> Iterator[ReadItem]:
        """What is read before the check."""
        names = [*self._stored.options, *([OURS] if is_ours(self._metadata) else [])]
        names += [self._stored.state(*entry) for entry in self._entries() if not self._is_large(*entry)]
        for name in names:
            form = form_of(self._metadata, name)
            if form is None:
                yield read_object(name)
            elif prod(form.size) * form.properties.dtype.itemsize > _SMALL_BYTES:
                raise CheckpointError(f"{self._folder}: {name} is a tensor that {self._optimizer.rules.name} has not")
            else:
                yield from arrivals.plan(name, form, self._taken(name, form))

    def large(self, arrivals: Arrivals) -> Iterator[ReadItem]:
        """What is read into its places."""
        for parameter, key in self._entries():
            name = self._stored.state(parameter, key)
            form = form_of(self._metadata, name)
            if form is not None and self._is_large(parameter, key):
                yield from arrivals.plan(name, form, self._contents.state(self._parameters[parameter], key))

    def _entries(self) -> Iterator[tuple[str, str]]:
        """Parameter and key of each entry of a state, of parameters that are here."""
        for parameter, keys in self._stored.states.items():
            if parameter in self._parameters:
                yield from ((parameter, key) for key in keys)

    def _is_large(self, parameter: str, key: str) -> bool:
        """True if it has a value for each element of a parameter in chunks."""
        return key in self._contents.state_names(self._parameters[parameter])

    def _taken(self, name: str, form: TensorStorageMetadata) -> Piece:
        """A tensor that is only kept."""
        like = torch.empty(tuple(form.size), dtype=form.properties.dtype, device="meta")
        return Piece.whole((name,), like, Seat(), partial(torch.empty, 0), partial(self._values.__setitem__, name))

    # -- checking

    def check(self, objects: Mapping[str, Any]) -> None:
        """Check groups and states as `load_optimizer` does.

        Raises
        ------
        CheckpointError
            If they do not fit.
        """
        self._values |= {name: objects[name] for name in objects if name.startswith((self._stored.prefix, OURS))}
        ours = [[self._contents.name(p) for p in group["params"]] for group in self._optimizer.param_groups]
        try:
            groups = self._stored.groups(self._values, ours)
            saved = self._as_saved(groups)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self._folder} has no whole state of an optimizer: {error!r}") from error
        self._saved = checked_saved(self._optimizer, saved, self._folder)

    def _as_saved(self, groups: Sequence[Mapping[str, Any]]) -> SavedOptimizer:
        """With the parameters numbered."""
        numbered, states = [], {}
        for group in groups:
            first = len(self._names)
            self._names += map(str, group["params"])
            numbers = list(range(first, len(self._names)))
            numbered.append({**group, "params": numbers, "param_names": self._names[first:]})
            for number in numbers:
                if keys := self._stored.states.get(self._names[number]):
                    states[number] = {key: self._entry(self._names[number], key) for key in keys}
        ours = self._values.get(OURS, {})
        return SavedOptimizer(numbered, states, ours.get("loss_scaler"), ours.get("optimizer"))

    def _entry(self, parameter: str, key: str) -> Any:
        """A value, or what is known of a tensor that is still to be read."""
        name = self._stored.state(parameter, key)
        if name not in self._values:
            form = form_of(self._metadata, name)
            if form is None:
                return None
            here, shape = self._parameters.get(parameter), tuple(form.size)
            if here is not None and shape == whole_shape(here):  # of a part of a tensor, the shape of the part
                shape = tuple(here.shape)
            return Source(shape, form.properties.dtype, partial(torch.empty, 0))
        value = self._values[name]
        return float(value) if key == STEP else Source.of(value) if isinstance(value, Tensor) else value

    # -- loading

    def finish(self) -> None:
        """Give the groups their options, and say which parameters have a state; the values are there."""
        assert self._saved is not None
        for group, of in zip(self._optimizer.param_groups, self._saved.param_groups, strict=True):
            load_options(group, {key: value for key, value in of.items() if key != "param_names"})
            for parameter, number in zip(group["params"], of["params"], strict=True):
                self._begin(parameter, self._saved.states.get(number))
        if self._contents.scaler is not None and self._saved.loss_scaler is not None:
            self._contents.scaler.load_state_dict(self._saved.loss_scaler)
        self._optimizer.after_load_state_dict()

    def _begin(self, parameter: Tensor, state: Mapping[str, Any] | None) -> None:
        kept = None if self._contents.step is None else self._contents.step.kept
        if kept is not None and kept.keeps(parameter):
            if state is None:
                kept.drop(parameter)
            else:
                kept.begin(parameter, {key: _value(value) for key, value in state.items()})  # looks at no values
        elif state is None:
            self._optimizer.state.pop(parameter, None)
        else:
            self._optimizer.restore_state(parameter, {key: _value(value) for key, value in state.items()})


def _value(value: Any) -> Any:
    return value.read() if isinstance(value, Source) else value
