"""One visit of a unit whose saved tensors are computed again in backward.

The scheme is that of ``torch.utils.checkpoint`` without reentrant autograd: tensors are numbered as forward saves them,
and when backward asks for the first one the forward runs again and the same numbers are filled in, up to the last.

Two things are different, which is why it is not torch's own that is called. *It is decided at the end of the forward*:
until then what was saved is held, and where the forward turns out to have changed what it would need to run again (an
input in place, a tensor of its module, what is deep in an attribute) it stays as it was saved. And *modules are left as
they are*: see `module_state`. What the program changes before backward is put back for that time, or backward raises.
What lies outside of its modules and inputs (a global list) is not seen, nor is a change of a
parameter or a large tensor through ``.data``: a program that changes these in its forward does so twice.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..torch_private import current_backward
from .held_state import HeldState
from .inputs import InputCopies, Inputs, KeptInputs, Pack, Packed
from .module_state import ModuleState, Place
from .repeatable import Reason, why_not
from .surroundings import Surroundings

ONE_AT_A_TIME = threading.RLock()
"""Held while a forward runs again: random states and modules' attributes belong to the whole process."""


class Held(Packed, Protocol):
    """A tensor that is kept where it is."""

    @property
    def is_changed(self) -> bool:
        """True if it was changed in place since, or given other memory."""


_Form = tuple[tuple[int, ...], torch.dtype, torch.device]
"""By which a tensor that was computed again is recognised."""


class _Enough(Exception):
    """All that forward had saved is there: what is left of it need not run."""


class Saved:
    """A tensor that a forward has saved, by its number; autograd holds it in the tensor's place.

    While forward runs it has the tensor. After that it has it, has moved it, or the visit computes it again.
    """

    __slots__ = ("__weakref__", "_held", "_index", "_packed", "_visit")

    def __init__(self, visit: "RecomputedVisit", index: int, packed: Held) -> None:
        self._visit = visit
        self._index = index
        self._packed: Packed | None = packed
        self._held: Held | None = packed
        """The same, while it is where it was."""

    @property
    def is_changed(self) -> bool:
        """True if the tensor was changed since, so that it has to stay where it is."""
        return self._held is not None and self._held.is_changed

    def unpack(self) -> Tensor:
        """The tensor, computed again if need be."""
        return self._visit.again(self._index) if self._packed is None else self._packed.unpack()

    def drop(self) -> None:
        """Let the tensor go: it can be computed again."""
        self._packed = self._held = None

    def move(self, pack: Pack) -> None:
        """Keep the tensor in another way, if it is as it was."""
        if self.is_changed:
            return
        tensor = self.unpack()
        self._packed = self._held = None  # who packs it may want to be the only one who has it
        self._packed = pack(tensor)


class RecomputedVisit:
    """One call of a module that may run again: numbers what it saves.

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
        self._name = name
        self._module = ref(module)
        self._inputs: Inputs | KeptInputs = Inputs(args, kwargs)
        self._values = HeldState()
        """Those of small inputs: not every change in place raises a version."""
        for tensor in self._inputs.tensors:
            self._values.note_tensor(tensor)
        self._state = ModuleState(module.modules(), changing)
        self._surroundings = Surroundings.now({tensor.device for tensor in self._inputs.tensors})
        self._saved: list[ref[Saved]] = []
        self._forms: list[_Form] = []
        self._again = _Again(-1)

    def save(self, tensor: Tensor, keep: Callable[[Tensor], Held]) -> Saved:
        """Autograd saves a tensor: number it, and ``keep`` it until the forward ends."""
        saved = Saved(self, len(self._saved), keep(tensor))
        self._saved.append(ref(saved))
        self._forms.append(_form(tensor))
        return saved

    # -- the forward is over

    @property
    def saved(self) -> Iterator[Saved]:
        """What it has saved and autograd still holds."""
        return (saved for saved in (reference() for reference in self._saved) if saved is not None)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that it was given, until it is over."""
        return self._inputs.tensors if isinstance(self._inputs, Inputs) else []

    def why_held(self) -> Reason | None:
        """Why the forward cannot run again with the same result; None if it can."""
        assert isinstance(self._inputs, Inputs)
        if kind := self._inputs.opaque():
            return Reason(f"it is given a {kind}, which it may change")
        if self._inputs.are_changed() or self._values.changed():
            return Reason("it changes its input in place")
        if places := self._state.changed_in_place():
            names = ", ".join(place.name for place in places)
            is_one = self._state.share_memory(places)
            return Reason(
                f"it changes {names} in place{', which share memory' if is_one else ''}",
                () if is_one else tuple(places),
            )
        if text := self._state.changed_deep():
            return Reason(text)
        if mode := self._surroundings.unknown_mode:
            return Reason(f"it runs under a {mode}, which sees its operations", is_passing=True)
        if any(saved.is_changed for saved in self.saved):
            return Reason("it changes what operations have saved for backward")
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
        self._values = HeldState()
        self._state.settle()
        for saved in self.saved:
            saved.drop()

    def hold(self) -> None:
        """It will not run again: forget what only that needs."""
        self._inputs, self._values, self._state = Inputs((), {}), HeldState(), ModuleState(())

    # -- backward

    def again(self, index: int) -> Tensor:
        """A saved tensor by its number, computed again.

        Raises
        ------
        RuntimeError
            If the forward did not do the same again.
        """
        with ONE_AT_A_TIME:
            backward = current_backward()
            if backward != self._again.backward or backward == -1:
                self._again = _Again(backward)
            if index not in self._again.tensors:
                self._again.fill(index, self._run_again())
            return self._again.take(index)

    def _run_again(self) -> dict[int, Tensor]:
        """All saved tensors that autograd still holds, by their numbers."""
        module = self._module()
        assert module is not None and isinstance(self._inputs, KeptInputs)
        self._check_unchanged(module)
        args, kwargs = self._inputs.arguments()
        found: dict[int, Tensor] = {}
        forms: list[_Form] = []

        def save(tensor: Tensor) -> Tensor:
            index = len(forms)
            if index < len(self._forms):
                forms.append(_form(tensor))
                if self._saved[index]() is not None:  # else autograd has freed it already
                    found[index] = tensor.detach()
            if len(forms) == len(self._forms):
                raise _Enough
            return tensor.detach()

        with (
            suppress(_Enough),
            self._surroundings.restored(),
            self._state.restored(),
            saved_tensors_hooks(save, _itself),
        ):
            self._surroundings.variables.copy().run(module, *args, **kwargs)
        if forms != self._forms:
            raise RuntimeError(_changed_text(self._name, self._forms, forms))
        return found

    def _check_unchanged(self, module: nn.Module) -> None:
        """Raise if the program has changed what the forward depends on since it ran."""
        if places := self._state.changed_in_place():
            names = ", ".join(place.name for place in places)
            text = f"variables needed for gradient computation have been modified by an inplace operation: {names}"
        elif names := ", ".join(self._state.replaced()):
            text = f"parts needed for gradient computation have been replaced: {names}"
        elif reason := why_not(module):
            text = reason.text
        else:
            return
        raise RuntimeError(
            f"{self._name}: {text}. Its forward has to run again in backward, as it ran before. Change it after the "
            'backward, or set activation_policy="offload" or "keep"'
        )


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
