"""Dynamic loss scale for fp16."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from ..nn.optimizer.rules.option_ranges import brief


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
            If it is not whole, names something unknown, or has values that make no sense. Nothing has changed then.
        """
        for name, value in asdict(LossScaler.of_state(state)).items():
            setattr(self, name, value)

    @classmethod
    def of_state(cls, state: Any) -> "LossScaler":
        """A scaler with a saved state.

        Raises
        ------
        ValueError
            As of `load_state_dict`.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the saved loss scaler is {brief(state)}, expected names and numbers")
        known = cls.__dataclass_fields__
        for name in state:
            if name not in known:
                raise ValueError(f"the saved loss scaler has {brief(name)}, which this version does not know")
        if lost := [name for name in known if name not in state]:
            raise ValueError(f"the saved loss scaler lacks {', '.join(lost)}")
        for name, field in known.items():
            value, kind = state[name], int if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name} of the saved loss scaler must be a number, got {brief(value)}")
        try:
            found = cls(**state)
        except ValueError as error:
            raise ValueError(f"the saved loss scaler makes no sense: {error}") from error
        for name in ("good_steps", "overflows"):
            if getattr(found, name) < 0:
                raise ValueError(f"{name} of the saved loss scaler must be 0 or more, got {getattr(found, name)}")
        return found
