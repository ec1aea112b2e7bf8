"""Dynamic loss scale for fp16."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf


@dataclass(slots=True, kw_only=True)
class LossScaler:
    """Grows the scale while gradients stay finite, backs off when they overflow (ColossalAI's parameters)."""

    scale: float = 2.0**16
    min_scale: float = 1.0
    max_scale: float = 2.0**32
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 1000
    """Finite steps in a row before the scale grows."""
    hysteresis: int = 2
    """Overflows in a row that are tolerated before the scale backs off is one less than this."""
    good_steps: int = 0
    overflows: int = 0

    def __post_init__(self) -> None:
        for name in ("growth_interval", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0.0 < self.min_scale <= self.scale <= self.max_scale < inf:
            raise ValueError(
                f"expected 0 < min_scale <= initial_scale <= max_scale, finite, "
                f"got {self.min_scale}, {self.scale}, {self.max_scale}"
            )
        if not 1.0 <= self.growth_factor < inf or not 0.0 < self.backoff_factor < 1.0:
            raise ValueError(
                f"expected growth_factor >= 1 and 0 < backoff_factor < 1, "
                f"got {self.growth_factor}, {self.backoff_factor}"
            )

    def update(self, overflow: bool) -> None:
        """Adapt to one step."""
        if overflow:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self.overflows = 0
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = 0
            self.scale = min(self.scale * self.growth_factor, self.max_scale)

    def state_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Take over a saved state.

        Raises
        ------
        ValueError
            If it names something unknown, or values that make no sense. Nothing has been changed then.
        """
        unknown = [name for name in state if name not in asdict(self)]
        if unknown:
            raise ValueError(
                f"the saved loss scaler has {', '.join(map(repr, unknown))}, which this version does not know"
            )
        LossScaler(**{**asdict(self), **state})
        for name, value in state.items():
            setattr(self, name, value)
