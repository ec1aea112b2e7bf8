"""Where one state of one parameter is in its chunk, for those who read or replace it in parts."""

from dataclasses import dataclass

from torch import Tensor

from ..chunk import Codec, SlotValues
from ..nn.optimizer.rules.rule import Rule
from ..updates.values import Values
from .shown_states import ShownStates


@dataclass(frozen=True, slots=True)
class StateHome:
    """A state, by its name in state dicts."""

    values: Values
    rule: Rule
    shown: ShownStates
    parameter: Tensor
    name: str

    def open(self) -> SlotValues | None:
        """The values, in the order of the parameter's elements.

        None where they cannot be read in parts, or are kept in another form than state dicts have them.
        """
        codec = self._codec
        if codec is None:
            return None
        opened = self.values.open(self.parameter, codec.specs[0].name)
        return opened if opened is not None and opened.dtype == codec.dtype else None

    def open_to_replace(self) -> SlotValues | None:
        """The same for values all of which are going to be replaced; then call `replaced`."""
        codec = self._codec
        if codec is None:
            return None
        self.shown.let_go(self.parameter, self.name)
        return self.values.open_to_replace(self.parameter, codec.specs[0].name)

    def replaced(self) -> None:
        """The values have been replaced by means of `open_to_replace`."""
        codec = self._codec
        assert codec is not None
        self.values.replaced(self.parameter, codec.specs[0].name)

    @property
    def _codec(self) -> Codec | None:
        """What says how it lies in its buffer; None of a note, and where that is not how state dicts have it."""
        place = self.values.manager.find(self.parameter)
        assert place is not None
        codec = self.rule.codecs(place[0].states).get(self.name)
        if codec is None or codec.computes or len(codec.specs) != 1 or codec.specs[0].block_numel != 1:
            return None
        return codec
