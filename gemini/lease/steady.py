"""When a holder follows what it is granted: down at once, up only after a while. Pure."""

from dataclasses import dataclass, replace

LEAST_CHANGE_BYTES = 16 << 20
DOWN_RATIO, UP_RATIO = 0.03, 0.06
"""Parts of what is held. Smaller changes of a grant are noise: memory of other programs comes and goes."""
UP_SECONDS = 3.0
"""For as long a larger grant has to stand before it is followed."""
PRESSED_RATIO = 0.85
"""What is held under pressure from others, of what was held before; each further look at pressure takes as much."""
REST_SECONDS = 20.0
"""For as long nothing grows after pressure."""


@dataclass(frozen=True, slots=True)
class Steady:
    """What a holder has followed so far."""

    held: int
    """Bytes."""
    larger_since: float | None = None
    """When the grant began to be larger than what is held."""
    rests_until: float = 0.0
    """Nothing grows before."""

    def follow(self, grant: int, floor: int, now: float, is_pressed: bool = False) -> "Steady":
        """What is to be held from now on.

        Parameters
        ----------
        grant
            Bytes that the holder may have.
        floor
            Pressure takes nothing below it.
        now
            Seconds of any clock that does not go back.
        is_pressed
            Programs on this machine, ours or others, wait for memory.
        """
        if is_pressed:
            pressed = max(min(grant, int(self.held * PRESSED_RATIO)), min(floor, self.held))
            return Steady(pressed, None, now + REST_SECONDS)
        if grant < self.held - max(LEAST_CHANGE_BYTES, int(self.held * DOWN_RATIO)):
            return replace(self, held=grant, larger_since=None)
        if grant < self.held + max(LEAST_CHANGE_BYTES, int(self.held * UP_RATIO)) or now < self.rests_until:
            return replace(self, larger_since=None)
        if self.larger_since is None:
            return replace(self, larger_since=now)
        if now - self.larger_since < UP_SECONDS:
            return self
        return replace(self, held=grant, larger_since=None)
