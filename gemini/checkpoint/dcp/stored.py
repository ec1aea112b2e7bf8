"""What a checkpoint of `torch.distributed.checkpoint` holds of a model and an optimizer, ours or torch's.

Scripts choose the first names (``{"model": ..., "optim": ...}``, ``{"app": {"model": ...}}``, or none), and the state
dict of an optimizer comes in two forms::

    optim.param_groups.0.lr, optim.param_groups.0.params      by group: ``get_optimizer_state_dict``
    optim.param_groups.wte.weight.lr                          by parameter: with ``flatten_optimizer_state_dict``
    optim.state.wte.weight.exp_avg                            in both
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from gemini.errors import CheckpointError

from .pieces import OURS

_GROUPS = re.compile(r"^(?:(.*)\.)?param_groups\.(.+)$")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Where a model is among what is stored."""

    prefix: str
    """Before the names of its tensors, with its dot."""
    names: frozenset[str]
    """Of everything that has this prefix, without it."""

    @classmethod
    def of(cls, metadata: Metadata, expected: Iterable[str]) -> "StoredModel":
        """The model that has most of the expected names."""
        wanted, stored = set(expected), metadata.state_dict_metadata
        ends = (
            (name, at)
            for name in stored
            for at in (0, *(match.end() for match in re.finditer(r"\.", name)))
            if name[at:] in wanted
        )
        found = Counter(name[:at] for name, at in ends)
        prefix = max(found, key=lambda each: (found[each], -len(each)), default="model.")
        return cls(prefix, frozenset(name[len(prefix) :] for name in stored if name.startswith(prefix)))

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        """Names that the model does not have; not where they might be of something else."""
        return sorted(self.names - set(expected)) if self.prefix else []


@dataclass(frozen=True, slots=True)
class StoredOptimizer:
    """Where an optimizer is among what is stored."""

    prefix: str
    """Before ``state`` and ``param_groups``, with its dot."""
    is_by_parameter: bool
    options: Sequence[str]
    """Full names of what is stored of the groups."""
    states: Mapping[str, Sequence[str]]
    """By the name of a parameter: what is stored of its state."""

    @classmethod
    def of(cls, metadata: Metadata, folder: Any) -> "StoredOptimizer":
        """The optimizer.

        Raises
        ------
        CheckpointError
            If there is none, or more than one.
        """
        stored = metadata.state_dict_metadata
        options = [match for name in stored if (match := _GROUPS.match(name))]
        prefixes = {match[1] for match in options}
        if len(prefixes) != 1:
            several = f"several ({', '.join(map(str, sorted(map(str, prefixes))))})" if prefixes else "none"
            raise CheckpointError(f"{folder} is to have the state of one optimizer, and has {several}")
        (before,) = prefixes
        prefix = f"{before}." if before else ""
        states: dict[str, list[str]] = {}
        for name in stored:
            if name.startswith(f"{prefix}state."):
                parameter, _, key = name.removeprefix(f"{prefix}state.").rpartition(".")
                states.setdefault(parameter, []).append(key)
        is_by_parameter = f"{prefix}param_groups.0.params" not in stored
        return cls(prefix, is_by_parameter, [match[0] for match in options], states)

    def state(self, parameter: str, name: str) -> str:
        """The full name of an entry of a state."""
        return f"{self.prefix}state.{parameter}.{name}"

    def groups(self, values: Mapping[str, Any], ours: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The parameter groups, with the names of their parameters as ``params``.

        Parameters
        ----------
        values
            What is stored under each of `options`.
        ours
            The names in each group of the optimizer that is to take them over: for the form that has no groups.
        """
        found: dict[int, dict[str, Any]] = {}
        for name in self.options:
            key, _, option = name.removeprefix(f"{self.prefix}param_groups.").rpartition(".")
            if not self.is_by_parameter:
                found.setdefault(int(key), {})[option] = values[name]
                continue
            for index, names in enumerate(ours):
                if key in names:
                    found.setdefault(index, {"params": list(names)}).setdefault(option, values[name])
        if not found:
            raise KeyError(f"{self.prefix}param_groups.0.params")
        return [found[index] for index in sorted(found)]


def is_ours(metadata: Metadata) -> bool:
    """True if there is what torch's optimizers do not have."""
    return OURS in metadata.state_dict_metadata


def form_of(metadata: Metadata, name: str) -> TensorStorageMetadata | None:
    """Shape, dtype and boxes of a stored tensor; None if it is something else."""
    stored = metadata.state_dict_metadata.get(name)
    return stored if isinstance(stored, TensorStorageMetadata) else None
