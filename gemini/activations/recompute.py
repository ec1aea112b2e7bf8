"""One visit of a unit whose saved tensors are computed again in backward.

The scheme is that of ``torch.utils.checkpoint`` without reentrant autograd: tensors are numbered as forward saves them,
and when backward asks for the first one the forward runs again and the same numbers are filled in, up to the last.

Two things are different, which is why it is not torch's own that is called. *It is decided at the end of the forward*:
until then what was saved is held, and where the forward turns out to have changed what it would need to run again (an
input in place, a tensor of its module) it stays as it was saved. So no program that plain PyTorch runs is broken. And
*modules are left as they are*: see `module_state`. A program that changes anything else in its forward does so twice.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..torch_private import current_backward, version_of
from .inputs import InputCopies, Inputs, KeptInputs, Pack
from .module_state import ModuleState, Place
from .surroundings import Surroundings

ONE_AT_A_TIME = threading.RLock()
"""Held while a forward runs again: random states and modules' attributes belong to the whole process."""


_Form = tuple[tuple[int, ...], torch.dtype, torch.device]
"""By which a tensor that was computed again is recognised."""


class _Enough(Exception):
    """All that forward had saved is there: what is left of it need not run."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a forward cannot run again with the same result."""

    text: str
    """What it does, in words, as in: "it changes its input in place"."""
    changing: tuple[Place, ...] = ()
    """The tensors of its modules that it changes. With copies of these it can run again next time."""


class Outcome(Enum):
    """What became of a visit when its forward ended."""

    OPEN = "open"
    """The forward still runs."""
    DROPPED = "dropped"
    """Saved tensors are gone and will be computed again."""
    HELD = "held"
    """They stay, because the forward cannot run again with the same result."""


class Saved:
    """A tensor that a forward has saved, by its number; autograd holds it in the tensor's place."""

    __slots__ = ("__weakref__", "_index", "_visit")

    def __init__(self, visit: "RecomputedVisit", index: int) -> None:
        self._visit = visit
        self._index = index

    def unpack(self) -> Tensor:
        """The tensor, computed again if need be."""
        return self._visit.tensor(self._index)


class RecomputedVisit:
    """One call of a module: holds what it saves until it ends, and computes it again after.

    Autograd holds it, and the garbage collector does not see through autograd: so it refers to modules weakly.

    Parameters
    ----------
    name, module
        Of the unit.
    args, kwargs
        Of the call.
    changing
        Where the module has tensors that its forward is known to change in place.
    """

    def __init__(self, name: str, module: nn.Module, args: Any, kwargs: Any, changing: Collection[Place] = ()) -> None:
        self.outcome = Outcome.OPEN
        self._name = name
        self._module = ref(module)
        self._inputs: Inputs | KeptInputs = Inputs(args, kwargs)
        self._state = ModuleState(module.modules(), changing)
        self._surroundings = Surroundings.now({tensor.device for tensor in self._inputs.tensors})
        self._saved: list[ref[Saved]] = []
        self._held: list[tuple[Tensor, int]] = []
        """Each tensor that was saved, with its version; empty once they are dropped."""
        self._forms: list[_Form] = []
        self._again = _Again(-1)

    def save(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor: number it."""
        saved = Saved(self, len(self._saved))
        self._saved.append(ref(saved))
        self._held.append((tensor.detach(), version_of(tensor)))
        return saved

    # -- the forward is over

    def why_held(self) -> Reason | None:
        """Why the forward cannot run again with the same result; None if it can."""
        assert isinstance(self._inputs, Inputs)
        if kind := self._inputs.opaque():
            return Reason(f"it is given a {kind}, which it may change")
        if self._inputs.are_changed():
            return Reason("it changes its input in place")
        if places := self._state.changed_in_place():
            names = ", ".join(place.name for place in places)
            return Reason(f"it changes {names} in place", tuple(places))
        return None

    def drop(self, copies: InputCopies, pack: Pack) -> None:
        """Let what was saved go; it is computed again from copies of the inputs.

        Parameters
        ----------
        copies
            Has those of other visits.
        pack
            Keeps a copy: where it is, or on another tier.
        """
        assert isinstance(self._inputs, Inputs)
        self._inputs = self._inputs.keep(copies, pack)
        self._forms = [_form(tensor) for tensor, _ in self._held]
        self._held.clear()
        self.outcome = Outcome.DROPPED

    def hold(self) -> None:
        """Keep what was saved as it is."""
        self._inputs, self._state = Inputs((), {}), ModuleState(())
        self.outcome = Outcome.HELD

    # -- backward

    def tensor(self, index: int) -> Tensor:
        """A saved tensor by its number.

        Raises
        ------
        RuntimeError
            If it has been changed in place since, as plain PyTorch does; or if the forward did not do the same again.
        """
        if self.outcome is not Outcome.DROPPED:
            return self._unchanged(index)
        with ONE_AT_A_TIME:
            backward = current_backward()
            if backward != self._again.backward or backward == -1:
                self._again = _Again(backward)
            if index not in self._again.tensors:
                self._again.fill(index, self._run_again())
            return self._again.take(index)

    def _unchanged(self, index: int) -> Tensor:
        tensor, version = self._held[index]
        if version_of(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(tensor.shape)} that {self._name} has saved is at version "
                f"{version_of(tensor)}; expected version {version} instead"
            )
        return tensor

    def _run_again(self) -> dict[int, Tensor]:
        """All saved tensors that autograd still holds, by their numbers."""
        module = self._module()
        assert module is not None and isinstance(self._inputs, KeptInputs)
        args, kwargs = self._inputs.arguments()
        found: dict[int, Tensor] = {}
        forms: list[_Form] = []

        def save(tensor: Tensor) -> Tensor:
            index = len(forms)
            if index < len(self._forms):
                forms.append(_form(tensor))
                if self._saved[index]() is not None:
                    found[index] = tensor.detach()
            if len(forms) == len(self._forms):
                raise _Enough
            return tensor.detach()

        with (
            suppress(_Enough),
            self._surroundings.restored(),
            self._state.restored(),
            torch.enable_grad(),
            saved_tensors_hooks(save, _itself),
        ):
            module(*args, **kwargs)
        if forms != self._forms:
            raise RuntimeError(_changed_text(self._name, self._forms, forms))
        return found


@dataclass(slots=True)
class _Again:
    """What was computed again for one backward."""

    backward: int
    tensors: dict[int, Tensor] = field(default_factory=dict)
    """Those that were not asked for yet, by their numbers."""
    taken: set[int] = field(default_factory=set)
    is_kept: bool = False
    """Tensors stay: this backward asks for some of them twice."""

    def fill(self, index: int, tensors: Mapping[int, Tensor]) -> None:
        """All were computed, because ``index`` was not there."""
        self.is_kept = index in self.taken
        self.tensors.update(tensors)

    def take(self, index: int) -> Tensor:
        """One of them."""
        self.taken.add(index)
        return self.tensors[index] if self.is_kept else self.tensors.pop(index)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _form(tensor: Tensor) -> _Form:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _changed_text(name: str, expected: Sequence[_Form], got: Sequence[_Form]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    shown = [str(forms[at]) if at < len(forms) else "none" for forms in (expected, got)]
    return (
        f"{name}: its forward ran again in backward and saved other tensors than before (number {at}: expected "
        f"{shown[0]}, got {shown[1]}); it depends on something that it or the program has changed since. "
        'Set activation_policy="offload" or "keep"'
    )
