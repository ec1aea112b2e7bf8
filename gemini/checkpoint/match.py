"""Which stored tensor goes where: everything is compared before anything is changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemini.chunk import converts, copy_fault
from gemini.errors import CheckpointError

from ..formats import listed, shown
from ..torch_private import IncompatibleKeys
from .filling import Filling
from .names import Entry, entries, extra_state_owner, extra_states, is_extra_state, left_out, under_plain_names
from .pairs import tell_loaded
from .ranks import checked_by_all, loaded_by_all
from .safetensors_stream import SafetensorsFile

_MISFITS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    fault: str | None = None
    """Why it cannot be read; None if it can."""
    file: SafetensorsFile | None = None
    """Has it as ``name_in_file``; None: only `read` has it."""
    name_in_file: str = ""

    @classmethod
    def in_file(cls, file: SafetensorsFile, name: str) -> "Source":
        record = file.records[name]
        return cls(record.shape, record.dtype, partial(file.read, name), None, file, name)

    @classmethod
    def of(cls, value: Tensor) -> "Source":
        shape = (-1,) if value.is_nested else tuple(value.shape)
        return cls(shape, value.dtype, lambda: value.resolve_conj().resolve_neg(), copy_fault(value))


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
        faults = [listed(self.misfits, "\n    ", _MISFITS_SHOWN, width=300)] if self.misfits else []
        if strict and self.missing:
            faults.append(f"missing ({len(self.missing)}): {listed(self.missing)}")
        if strict and self.unexpected:
            faults.append(f"unexpected ({len(self.unexpected)}): {listed(self.unexpected)}")
        if faults:
            raise CheckpointError(f"{what} does not fit the model, which is as it was:\n    " + "\n    ".join(faults))

    def load(self, model: nn.Module) -> IncompatibleKeys:
        """Copy everything into the model: in parts where that is possible, else one tensor at a time.

        Returns
        -------
        NamedTuple
            ``missing_keys`` and ``unexpected_keys``, as ``load_state_dict``.

        Raises
        ------
        CheckpointError
            If a module does not take its extra state. The others have theirs from before, and no tensor has changed.
        """
        with _put_back_on_failure() as undo:
            for name, value in self.extra.items():
                module = extra_state_owner(model, name)
                undo.append(partial(module.set_extra_state, module.get_extra_state()))
                try:
                    module.set_extra_state(value)
                except Exception as error:  # a user's module, and what it expects is for it to know
                    raise CheckpointError(
                        f"{shown(name)} is not taken by its module, and the model is as it was: {error!r}"
                    ) from error
        filling, whole = Filling(), []
        for entry, source in self.pairs:
            if source.file is None or not filling.take(entry, source.file, source.name_in_file):
                whole.append((entry, source))
        filling.run()
        for entry, source in whole:
            own = entry.own_elements() if source.file is not None else None
            if source.file is not None and own is not None:
                entry.write_own(source.file.read_part(source.name_in_file, own))
            else:
                entry.write(source.read())
        return IncompatibleKeys(list(self.missing), list(self.unexpected))


def match(model: nn.Module, stored: Mapping[str, Any]) -> Match:
    """Compare what is stored (`Source` for tensors, anything for extra states) with what the model has.

    One name of a tied tensor is enough; its other names are accepted, and of several values it gets the last one, as
    from torch. Expected is, too, what hooks leave out of ``state_dict()``.
    """
    stored = under_plain_names(stored)
    held = (*entries(model), *left_out(model))
    pairs: list[tuple[Entry, Source]] = []
    missing: list[str] = []
    misfits: list[str] = []
    for entry in held:
        name = next((name for name in reversed(entry.names) if isinstance(stored.get(name), Source)), None)
        if name is None:
            missing.append(entry.name)
            continue
        source = stored[name]
        if source.fault is not None:
            misfits.append(f"{shown(name)}: {source.fault}")
        elif source.shape != entry.shape:
            misfits.append(f"{name}: stored with shape {source.shape}, the model has {entry.shape}")
        elif not converts(source.dtype, entry.dtype):
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
        incompatible = found.load(model)
    if not strict:  # one name of a tied tensor is enough, but torch counts the others as missing
        more = [name for entry, _ in found.pairs for name in entry.names if name not in stored]
        incompatible.missing_keys.extend(more)
    return incompatible


@contextmanager
def _put_back_on_failure() -> Iterator[list[Callable[[], object]]]:
    """Yields a list of what is to be called, last things first, if the body raises."""
    undo: list[Callable[[], object]] = []
    try:
        yield undo
    except BaseException:
        for each in reversed(undo):
            each()
        raise


def _unexpected(stored: Iterable[str], expected: set[str]) -> tuple[str, ...]:
    names: Sequence[str] = [name for name in stored if name not in expected]
    return tuple(names)


def _plain(value: Any) -> Any:
    return value.read() if isinstance(value, Source) else value
