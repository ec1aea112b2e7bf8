"""The optimizer's states of parameters in chunks: each value alone, in the layout of torch's state dicts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..chunk import MASTER
from ..nn.optimizer.rules.rule import has_state, steps_of, whole_steps
from ..nn.optimizer.rules.rules import Rules
from ..signals import uninterrupted
from .saved_states import home_of, read_state, write_state
from .state_checks import STEP, check_signs, check_value
from .state_questions import StateQuestions
from .state_tensor import StateTensor


@uninterrupted.in_methods("get", "copy", "open", "close", "set", "unset", "replace", "load", "begin", "forget", "drop")
class KeptStates(StateQuestions):
    """Says which parameters have a state, and reads, replaces and forgets it.

    What the optimizer keeps of a parameter is whole or not there at all: what nobody has set in it is what the first
    step finds. Beside it there may be notes, entries of others that the optimizer does not know.

    Parameters
    ----------
    values, updater
        Reads and replaces the values, and counts the steps.
    rules
        The optimizer's arithmetic.
    """

    # -- reading

    def get(self, parameter: Tensor, name: Any) -> Any:
        """One entry of a state: a tensor that shows it, or a note.

        Raises
        ------
        KeyError
            If there is none.
        """
        notes = self._notes.get(id(parameter), {})
        if name in notes:
            return notes[name]
        if name not in self.names(parameter):
            raise KeyError(name)
        if name == STEP and isinstance(steps := self._rules.of(parameter).counted(self.count(parameter)), int):
            return steps
        return self.shown.place(self, parameter, name).show()

    def copy(self, parameter: Tensor, name: Any) -> Any:
        """One entry of a state, as state dicts have it: tensors as copies on CPU."""
        notes = self._notes.get(id(parameter), {})
        if name in notes:
            return notes[name].detach().to("cpu", copy=True) if isinstance(notes[name], Tensor) else notes[name]
        if name == STEP:
            return self._rules.of(parameter).counted(self.count(parameter))
        if name in self._sides.shapes(parameter):
            self._values.check_readable()
            return self._sides.get(parameter, name).detach().to("cpu", copy=True)
        return read_state(self._values, self._rules.of(parameter), parameter, name)

    def open(self, parameter: Tensor, name: str) -> Tensor:
        """The values, for an operation on them: the home itself where it has them as they are shown, else a copy."""
        self._values.check_readable()
        if name == STEP:
            return torch.tensor(float(self.count(parameter)), dtype=torch.float32, device="cpu")
        if name in self._sides.shapes(parameter):
            return self._sides.get(parameter, name).to(self.device(parameter, name))
        home = home_of(self._manager, self._rules.of(parameter), parameter, name)
        return (
            read_state(self._values, self._rules.of(parameter), parameter, name).to(parameter.device)
            if home is None
            else home
        )

    # -- writing

    def refuse_changes(self) -> None:
        """Raise where the values are of no single step."""
        self._values.check_readable()

    def close(self, parameter: Tensor, name: str, values: Tensor) -> None:
        """Bring home what was changed in what `open` returned."""
        if name == STEP:
            self._updater.steps[id(parameter)] = whole_steps(values)
        elif name in self._sides.shapes(parameter):
            self._sides.load(parameter, name, values)
        elif home_of(self._manager, self._rules.of(parameter), parameter, name) is None:
            check_value(self._chunk(parameter), parameter, name, values)
            write_state(self._values, self._rules.of(parameter), parameter, name, values)

    def set(self, parameter: Tensor, name: Any, value: Any) -> None:
        """Replace one entry of a state, which begins with it if there was none. Copies, but for notes.

        Raises
        ------
        TypeError, ValueError
            If it cannot be kept. Nothing has changed then.
        """
        if self.shown.has(parameter, name, value):
            return
        self._values.check_readable()
        if name not in (*self._known(parameter), MASTER):
            self._notes.setdefault(id(parameter), {})[name] = value
        elif value is None:
            if name in self.names(parameter):
                self.unset(parameter, name)
        else:
            self._check_value(parameter, name, value)
            if self._sides.shapes(parameter) and not self._is_begun(parameter) and name != MASTER:
                raise ValueError(
                    f"a parameter that has not been stepped has no {name}: assign its whole state "
                    f"({', '.join(self._known(parameter))}) at once"
                )
            self.load(parameter, name, value)
            if name != MASTER:
                self._updater.steps.setdefault(id(parameter), 0 if self._rules.of(parameter).takes_step else 1)

    def unset(self, parameter: Tensor, name: Any) -> None:
        """Take one entry away: a note, or the only thing that is kept.

        Raises
        ------
        KeyError, ValueError
            If there is none, or it is a part of what the optimizer needs.
        """
        notes = self._notes.get(id(parameter), {})
        if name in notes:
            del notes[name]
        elif name not in self.names(parameter):
            raise KeyError(name)
        elif self._known(parameter) != [name]:
            raise ValueError(
                f"{name} cannot be taken out of the state of a parameter, which is whole or not there: "
                f"optimizer.state.pop(p) forgets all of it, optimizer.state[p][{name!r}].zero_() sets this to zeros"
            )
        else:
            self._forget_values(parameter)

    def check(self, parameter: Tensor, state: Mapping[Any, Any]) -> None:
        """Raise what is wrong with a state that is to replace that of a parameter.

        Raises
        ------
        TypeError, ValueError
            If it is not whole, or has something that cannot be kept.
        """
        known = self._known(parameter)
        given = {name: value for name, value in state.items() if value is not None and name in (*known, MASTER)}
        missing = [name for name in known if name not in given]
        if missing and has_state(given):
            raise ValueError(
                f"the state of a parameter of shape {tuple(parameter.shape)} lacks {', '.join(missing)}: assign all of "
                f"{', '.join(known)}, which {self._rules.of(parameter).name} keeps, or {{}} to begin anew"
            )
        for name, value in given.items():
            self._check_value(parameter, name, value)

    def replace(
        self, parameter: Tensor, state: Mapping[Any, Any], read: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """Give a parameter another state, which has been checked; an empty one is none.

        Parameters
        ----------
        read
            From an entry to its value; each is asked for when it is needed, and one at a time. None: the values come
            by means of its `home`.
        """
        known = (*self._known(parameter), MASTER)
        given = {name: value for name, value in state.items() if value is not None and name in known}
        notes = {name: value for name, value in state.items() if value is not None and name not in known}
        self.shown.release(parameter)
        if not given.keys() >= set(self._known(parameter)):
            self._forget_values(parameter)
        for name, value in given.items():
            if not self.shown.has(parameter, name, value) and (values := read(value)) is not None:
                self.load(parameter, name, values)
        self._begin(parameter, given, {name: read(value) for name, value in notes.items()})

    def load(self, parameter: Tensor, name: str, value: Any) -> None:
        """Put one entry of a state, which has been checked, where it belongs."""
        if isinstance(value, StateTensor):
            value = value.clone()
        self.shown.let_go(parameter, name)
        if name == STEP:
            self._updater.steps[id(parameter)] = whole_steps(value)
        elif name == MASTER:
            self._values.write(parameter, MASTER, value)
        elif name in self._sides.shapes(parameter):
            self._sides.load(parameter, name, value)
        else:
            write_state(self._values, self._rules.of(parameter), parameter, name, value)

    def begin(self, parameter: Tensor, saved: Mapping[Any, Any]) -> None:
        """Say that a parameter has this state, whose values are in their places: count steps, and keep the notes."""
        kept = {slot.name for slot in self._chunk(parameter).states}
        known = {*kept, *self._known(parameter), STEP, MASTER}
        given = {name: value for name, value in saved.items() if name in known}
        for name in self._sides.shapes(parameter):
            if given.get(name) is not None:
                self.load(parameter, name, given[name])
        self._begin(parameter, given, {name: saved[name] for name in saved.keys() - known if saved[name] is not None})

    def forget(self, parameter: Tensor) -> None:
        """Make the state of a parameter what it is before the first step."""
        self._forget_values(parameter)
        self._notes.pop(id(parameter), None)

    def drop(self, parameter: Tensor) -> None:
        """Give a parameter no state, as before the first step; what shows the one of now keeps it."""
        self.shown.release(parameter)
        self.forget(parameter)

    def successor(self, rules: Rules) -> "KeptStates":
        """States of another optimizer for the same parameters; `succeed` makes them count."""
        return KeptStates(self._values, rules, self._updater)

    def succeed(self, former: "KeptStates") -> None:
        """Take the places of the states of another optimizer. All are what they are before the first step.

        Those who show a state of ``former`` keep what they show.
        """
        for chunk in self._manager.chunks:
            for parameter in (binding.parameter for binding in chunk.bindings if chunk.is_trainable):
                was_begun = former._is_begun(parameter)
                former.shown.release(parameter)
                former.shown.let_go(parameter, *former._known(parameter))
                self._updater.steps.pop(id(parameter), None)
                self._sides.forget(parameter)
                if was_begun or self._rules.of(parameter).has_initial_state:
                    self._fill(parameter)

    def _begin(self, parameter: Tensor, given: Mapping[str, Any], notes: Mapping[Any, Any]) -> None:
        if has_state(given):
            self._updater.steps[id(parameter)] = steps_of(self._rules.of(parameter), given)
        if notes:
            self._notes[id(parameter)] = dict(notes)
        else:
            self._notes.pop(id(parameter), None)

    def _forget_values(self, parameter: Tensor) -> None:
        if not self._is_begun(parameter):
            return
        self.shown.let_go(parameter, *self._known(parameter))
        self._fill(parameter)
        self._updater.steps.pop(id(parameter), None)
        self._sides.forget(parameter)

    def _check_value(self, parameter: Tensor, name: str, value: Any) -> None:
        if name in self._sides.shapes(parameter):
            self._sides.check(parameter, name, value)
        else:
            check_value(self._chunk(parameter), parameter, name, value)

    def _fill(self, parameter: Tensor) -> None:
        for slot in self._chunk(parameter).states:
            initial = torch.full((), self._rules.of(parameter).initial(slot.name), dtype=torch.float32, device="cpu")
            self._values.write(parameter, slot.name, initial)

    def check_signs(
        self, parameter: Tensor, state: Mapping[Any, Any], read: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """Raise ``ValueError`` if a saved state is negative whose signs belong to split masters; see `replace`."""
        if self.keeps(parameter):
            check_signs(self._chunk(parameter), state, read)
