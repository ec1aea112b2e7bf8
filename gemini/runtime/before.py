"""What a forward of the model may change beside its graph, noted before it, so that it can run again.

A forward that ran out of memory has drawn random numbers, updated running statistics, counted its calls. Before it runs
again all of that is as it was:

=============================  =======================================================================================
what                           how
=============================  =======================================================================================
random numbers                 states of torch's generators (CPU and device), of Python's and of NumPy's
buffers                        values of those that forwards change, and of small ones until a forward has not changed
                               them
attributes of user's modules   as they were, with what is in them: see `held_state`
inputs, parameters             are not copied: if one was changed in place the forward cannot run again
gradients                      if a backward within the forward has made some, the forward cannot run again
=============================  =======================================================================================

What lies elsewhere (a global counter, a list that a user's hook fills) is not seen, nor is a change of a large tensor
through its ``.data``.
"""

import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.held_state import SMALL_BYTES, HeldState
from ..activations.inputs import Inputs
from ..torch_private import forget_arguments, own_buffers, own_modules, version_of, without_torch_function

_TINY_BYTES = 16 << 10
"""Up to this size the values of a buffer are compared although no forward has changed it so far."""
_INTERNALS = frozenset((*vars(nn.Module()), "_gemini")) - {"training"}
_PLAIN = frozenset({bool, int, float, str, type(None)})


class BufferHabits:
    """Which buffers forwards have changed in place, and which they have not."""

    def __init__(self) -> None:
        self._changing: set[int] = set()
        self._steady: set[int] = set()

    def is_copied(self, buffer: Tensor) -> bool:
        """True if the values of a buffer have to be noted."""
        key = id(buffer)  # of one that has been dropped it may be another's: then nothing is copied, and it shows
        return key in self._changing or (key not in self._steady and buffer.nbytes <= SMALL_BYTES)

    def learn(self, buffer: Tensor, has_changed: bool) -> None:
        """A forward has changed a buffer, or has not."""
        if has_changed:
            self._changing.add(id(buffer))
        elif id(buffer) not in self._changing:
            self._steady.add(id(buffer))


class Before:
    """A moment before a forward.

    Parameters
    ----------
    model, parameters
        What is called, and what its chunks hold.
    args, kwargs
        Of the call.
    habits
        What is known of the model's buffers.
    count_gradients
        Tells how many gradients have come so far.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        args: Any,
        kwargs: Any,
        habits: BufferHabits,
        count_gradients: Callable[[], int],
    ) -> None:
        self._is_grad_enabled = torch.is_grad_enabled()
        self._habits = habits
        self._count_gradients, self._gradients = count_gradients, count_gradients()
        self._given, self._inputs = (args, kwargs), Inputs(args, kwargs)
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._held = HeldState(_all_modules(model))
        self._tensors: list[tuple[Tensor, int]] = []
        """Those that are not copied, with their versions."""
        self._buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        """Those that are copied, with their values."""
        with without_torch_function(), torch.no_grad():
            for module in _all_modules(model):
                self._note(module)
            self._tensors += [(parameter, version_of(parameter)) for parameter in parameters]
            for tensor in self._inputs.tensors:
                self._held.note_tensor(tensor)
        self._random = _random_states(parameters[0].device if parameters else torch.device("cpu"))

    def _note(self, module: nn.Module) -> None:
        if buffers := own_buffers(module):
            self._buffers.append((buffers, buffers.copy()))
            # Batch norm changes its statistics by an operation that does not say so.
            is_changing = getattr(module, "track_running_stats", False)
            for buffer in buffers.values():
                if buffer is not None and (is_changing or self._habits.is_copied(buffer)):
                    self._values.append((buffer, buffer.clone()))
                elif buffer is not None and buffer.nbytes <= _TINY_BYTES:
                    self._held.note_tensor(buffer)
                elif buffer is not None and not buffer.is_inference():
                    self._tensors.append((buffer, version_of(buffer)))
        if type(module).__module__.startswith("torch.nn.modules."):
            return  # torch's own keep nothing in attributes
        held = vars(module)
        attributes = {name: held[name] for name in held.keys() - _INTERNALS}
        self._attributes.append((module, attributes))
        for name, value in attributes.items():
            if type(value) not in _PLAIN:
                self._held.note(f"{type(module).__name__}.{name}", value)

    def learn(self) -> None:
        """The forward is over, and has not failed."""
        with without_torch_function():
            for buffer, values in self._values:
                self._habits.learn(buffer, not torch.equal(buffer, values))

    def obstacle(self) -> str:
        """Why the forward cannot run again, in words; empty if it can."""
        if self._count_gradients() != self._gradients:
            return "a backward within it has made gradients"
        if (name := self._inputs.opaque()) is not None:
            return f"one of its inputs is a {name}, which it may have changed"
        again = Inputs(*self._given)
        if self._inputs.are_changed() or not self._inputs.is_alike(again):
            return "it has changed one of its inputs in place"
        with without_torch_function():
            if any(version_of(tensor) != version for tensor, version in self._tensors):
                return "it has changed a tensor of the model in place"
            return self._held.obstacle()

    def restore(self) -> None:
        """Have all be as it was then. There must be no `obstacle`."""
        with without_torch_function(), torch.no_grad():
            for buffers, then in self._buffers:
                for name in buffers.keys() - then.keys():
                    del buffers[name]
                buffers.update(then)
            for buffer, values in self._values:
                buffer.copy_(values)
        for module, attributes in self._attributes:
            held = vars(module)
            for name in held.keys() - _INTERNALS - attributes.keys():
                del held[name]
            held.update(attributes)
        self._held.restore()
        for set_state, state in self._random:
            set_state(state)
        torch.set_grad_enabled(self._is_grad_enabled)


def _all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """As ``model.modules()``, in a third of the time."""
    seen, left = {model}, [model]
    while left:
        yield (module := left.pop())
        for part in own_modules(module).values():
            if part is not None and part not in seen:
                seen.add(part)
                left.append(part)


def _random_states(device: torch.device) -> list[tuple[Callable[[Any], Any], Any]]:
    """How to set each generator's state, and the state that it has."""
    found: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.set_state, numpy.random.get_state()))
    if device.type != "cpu":
        module = torch.get_device_module(device)
        found.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return found


def forget_frames(error: BaseException) -> None:
    """Let go what the frames of an exception, and of those that it came from, have in their variables."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        for frame, _ in traceback.walk_tb(each.__traceback__):
            forget_arguments(frame)
        each = each.__cause__ or each.__context__
