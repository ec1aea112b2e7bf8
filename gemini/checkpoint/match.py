"""Which stored tensor goes where: everything is compared before anything is changed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from ..torch_private import IncompatibleKeys
from .flat_values import FlatValues
from .names import EXTRA_STATE, Entry, entries, extra_states, is_extra_state
from .pairs import tell_loaded
from .ranks import checked_by_all, loaded_by_all
from .safetensors_stream import SafetensorsFile
from .wording import listed

_MISFITS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: SafetensorsFile | None = None
    """Has it as ``name_in_file``; None: only `read` has it."""
    name_in_file: str = ""

    @classmethod
    def in_file(cls, file: SafetensorsFile, name: str) -> "Source":
        record = file.records[name]
        return cls(record.shape, record.dtype, partial(file.read, name), file, name)

    @classmethod
    def of(cls, value: Tensor) -> "Source":
        return cls(tuple(value.shape), value.dtype, lambda: value)


class Target(Protocol):
    """Where values of one tensor go."""

    def open_to_replace(self) -> FlatValues | None:
        """The values where they are, all of which are going to be replaced; None where only `write` can do that."""

    def replaced(self) -> None:
        """Values have been replaced by means of `open_to_replace`."""

    def write(self, value: Tensor) -> None:
        """Replace all values at once."""


def load_values(pairs: Iterable[tuple[Target, Source]]) -> None:
    """Replace values: what files have is read in parts, where that is possible, all else one tensor at a time."""
    of_file: dict[SafetensorsFile, dict[str, FlatValues]] = {}
    others: list[tuple[Target, Source]] = []
    opened: list[Target] = []
    try:
        for target, source in pairs:
            values = None
            if source.file is not None and source.name_in_file not in of_file.setdefault(source.file, {}):
                values = target.open_to_replace()
            if source.file is None or values is None:
                others.append((target, source))
            else:
                opened.append(target)
                of_file[source.file][source.name_in_file] = values
        for file, targets in of_file.items():
            file.load(targets)
    finally:
        for target in opened:
            target.replaced()
    for target, source in others:
        target.write(source.read())


@dataclass(frozen=True, slots=True)
class Match:
    """What to load."""

    pairs: tuple[tuple[Entry, Source], ...]
    extra: Mapping[str, Any]
    """Extra states, by name."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misfits: tuple[str, ...]
    """Stored tensors that are found and cannot be loaded, in words."""

    def check(self, strict: bool, what: str) -> None:
        """Raise one error about everything that is wrong.

        Raises
        ------
        CheckpointError
            If a tensor does not fit; with ``strict``, also if names are missing or unexpected.
        """
        faults = list(self.misfits[:_MISFITS_SHOWN])
        if len(self.misfits) > _MISFITS_SHOWN:
            faults.append(f"and {len(self.misfits) - _MISFITS_SHOWN} more that do not fit")
        if strict and self.missing:
            faults.append(f"missing ({len(self.missing)}): {listed(self.missing)}")
        if strict and self.unexpected:
            faults.append(f"unexpected ({len(self.unexpected)}): {listed(self.unexpected)}")
        if faults:
            raise CheckpointError(f"{what} does not fit the model, which is as it was:\n    " + "\n    ".join(faults))

    def load(self, model: nn.Module) -> None:
        """Copy everything into the model: in parts where that is possible, else one tensor at a time."""
        load_values(self.pairs)
        for name, value in self.extra.items():
            model.get_submodule(name.removesuffix(EXTRA_STATE).removesuffix(".")).set_extra_state(value)


def match(model: nn.Module, stored: Mapping[str, Any]) -> Match:
    """Compare what is stored (`Source` for tensors, anything for extra states) with what the model has.

    One name of a tied tensor is enough; its other names are accepted.
    """
    held = entries(model)
    pairs: list[tuple[Entry, Source]] = []
    missing: list[str] = []
    misfits: list[str] = []
    for entry in held:
        name = next((name for name in entry.names if isinstance(stored.get(name), Source)), None)
        if name is None:
            missing.append(entry.name)
            continue
        source = stored[name]
        if source.shape != entry.shape:
            misfits.append(f"{name}: stored with shape {source.shape}, the model has {entry.shape}")
        elif source.dtype.is_complex and not entry.dtype.is_complex:
            misfits.append(f"{name}: stored as {source.dtype}, the model has {entry.dtype}")
        else:
            pairs.append((entry, source))
    extras = extra_states(model)
    missing += [name for name in extras if name not in stored]
    expected = {name for entry in held for name in entry.names} | set(extras)
    extra = {name: _plain(stored[name]) for name in extras if name in stored}
    return Match(tuple(pairs), extra, tuple(missing), _unexpected(stored, expected), tuple(misfits))


def load_named(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """``load_state_dict`` of a boosted model.

    Parameters
    ----------
    strict
        Whether missing and unexpected names are an error.

    Returns
    -------
    NamedTuple
        ``missing_keys`` and ``unexpected_keys``, as torch does.

    Raises
    ------
    CheckpointError
        If names (with ``strict``) or shapes do not fit; all of them are named and nothing has been changed.
    """
    stored = {
        name: Source.of(value) if isinstance(value, Tensor) and not is_extra_state(name) else value
        for name, value in state_dict.items()
    }
    with checked_by_all(model, "load_state_dict"):
        found = match(model, stored)
        found.check(strict, f"the state dict for {type(model).__name__}")
    with loaded_by_all(model, "load_state_dict"):
        tell_loaded(model, None)
        found.load(model)
    missing = list(found.missing)
    if not strict:  # one name of a tied tensor is enough, but torch counts the others as missing
        missing += [name for entry, _ in found.pairs for name in entry.names if name not in stored]
    return IncompatibleKeys(missing, list(found.unexpected))


def _unexpected(stored: Iterable[str], expected: set[str]) -> tuple[str, ...]:
    names: Sequence[str] = [name for name in stored if name not in expected]
    return tuple(names)


def _plain(value: Any) -> Any:
    return value.read() if isinstance(value, Source) else value
