"""Which rule each parameter of an optimizer has: one for all, or, of several optimizers together, that of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .rule import Rule


class Rules(Protocol):
    """The arithmetic of an optimizer, by parameter and by group."""

    @property
    def name(self) -> str:
        """What checkpoints and messages call it."""

    @property
    def kept_in_group(self) -> tuple[str, ...]:
        """What it changes in groups in each step; see `Rule.kept_in_group`."""

    def of_group(self, group: Mapping[str, Any]) -> Rule:
        """The rule of one of the optimizer's own groups."""

    def of(self, parameter: Tensor) -> Rule:
        """The rule of a parameter."""


@dataclass(frozen=True, slots=True)
class OneRule:
    """The same rule for all parameters (a `Rules`)."""

    rule: Rule

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def kept_in_group(self) -> tuple[str, ...]:
        return self.rule.kept_in_group

    def of_group(self, group: Mapping[str, Any]) -> Rule:
        return self.rule

    def of(self, parameter: Tensor) -> Rule:
        return self.rule


class _Part(Protocol):
    @property
    def rule(self) -> Rule: ...

    @property
    def param_groups(self) -> Iterable[Mapping[str, Any]]: ...


class RulesOfParts:
    """The rules of several optimizers, each for the parameters of its groups (a `Rules`).

    Parameters
    ----------
    parts
        The optimizers, whose groups may change.
    """

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = tuple(parts)
        self._of: dict[int, Rule] = {}
        """By the id of a parameter. One that is taken out of its group keeps its state, and so its rule."""
        self._learn()

    @property
    def name(self) -> str:
        return "+".join(part.rule.name for part in self._parts)

    @property
    def kept_in_group(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self._parts for name in part.rule.kept_in_group))

    def of_group(self, group: Mapping[str, Any]) -> Rule:
        for part in self._parts:
            if any(each is group for each in part.param_groups):
                return part.rule
        raise ValueError("this parameter group belongs to none of the optimizers: add it with add_param_group of one")

    def of(self, parameter: Tensor) -> Rule:
        if id(parameter) not in self._of:
            self._learn()
        return self._of[id(parameter)]

    def _learn(self) -> None:
        for part in self._parts:
            for group in part.param_groups:
                self._of.update((id(parameter), part.rule) for parameter in group["params"])
