"""Where one state of one parameter is in its chunk, for those who read or replace it in parts."""

from dataclasses import dataclass

from torch import Tensor

from ..chunk import Codec, SlotValues
from ..nn.optimizer.rules.rule import Rule
from ..updates.values import Values
from .saved_states import codec_of
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
        opened = self.values.open(self.parameter, codec.specs[0].name) if _is_kept_so(codec) else None
        return opened if opened is not None and opened.dtype == codec.dtype else None

    def open_to_replace(self) -> SlotValues | None:
        """The same for values all of which are going to be replaced; then call `replaced`."""
        self.shown.let_go(self.parameter, self.name)
        codec = self._codec
        return self.values.open_to_replace(self.parameter, codec.specs[0].name) if _is_kept_so(codec) else None

    def replaced(self) -> None:
        """The values have been replaced by means of `open_to_replace`."""
        self.values.replaced(self.parameter, self._codec.specs[0].name)

    @property
    def _codec(self) -> Codec:
        return codec_of(self.values.manager, self.rule, self.parameter, self.name)


def _is_kept_so(codec: Codec) -> bool:
    return not codec.computes and len(codec.specs) == 1 and codec.specs[0].block_numel == 1
