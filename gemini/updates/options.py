"""What an optimizer says of its updates, without the optimizer: that one leads to the model's step, and back here."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.rules import Rules


@dataclass(frozen=True, slots=True)
class Options:
    """An optimizer's arithmetic and its parameter groups, as they are at any time."""

    rules: Rules
    param_groups: Sequence[Mapping[str, Any]]
    """The optimizer's own list and groups."""
    names: Collection[str]
    """The options of a group that its update depends on."""

    @staticmethod
    def of(optimizer: ManagedOptimizer) -> "Options":
        names = (*optimizer.defaults, *optimizer.rules.kept_in_group)
        return Options(optimizer.rules, optimizer.param_groups, names)

    def copied(self) -> list[Mapping[str, Any]]:
        """The values that each group has now."""
        return [
            {name: copy.deepcopy(group[name]) for name in self.names if name in group} for group in self.param_groups
        ]


def first_change(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The index of a group and the name of an option in it that has changed between two copies; None if none has."""
    for index, (before, after) in enumerate(zip(then, now, strict=False)):
        for name in after:
            if name not in before or not _same(before[name], after[name]):
                return index, name
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)
