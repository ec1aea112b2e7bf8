"""What the gradients in chunks are multiplied by, and what the next step multiplies into them."""

from dataclasses import dataclass


@dataclass(slots=True)
class Factor:
    """The two factors that lie between gradients as they are and as the optimizer is to use them."""

    is_scaled: bool = False
    """The loss was multiplied by the loss scale, and so the gradients are."""
    clipping: float = 1.0
    """Clipping asked for so far: gradients are left alone, and the step multiplies this in."""

    def scale(self) -> None:
        """Backward runs on a scaled loss."""
        self.is_scaled = True

    def clip(self, coefficient: float) -> None:
        """Multiply the gradients in the next step."""
        self.clipping *= coefficient

    def stepped(self) -> None:
        """The step has used it, or was skipped."""
        self.clipping = 1.0

    def forget(self) -> None:
        """The gradients are gone."""
        self.is_scaled, self.clipping = False, 1.0
