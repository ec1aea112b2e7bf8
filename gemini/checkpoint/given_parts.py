"""What the user gives to be saved or loaded: one object of a kind, or a dict of several."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gemini.nn.optimizer.joint import whole_of

MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER = "model", "optimizer", "lr_scheduler", "dataloader"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One object that is part of a checkpoint."""

    kind: str
    name: str
    """Its key in the dict that it was given in; empty if it was given by itself."""
    value: Any

    def path(self, file: str) -> str:
        """Where a file of it is in the checkpoint."""
        return f"{self.name}/{file}" if self.name else file

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else self.kind


def given_parts(*, model: Any, optimizer: Any, lr_scheduler: Any, dataloader: Any) -> list[Part]:
    """All parts, in the order of the kinds.

    Raises
    ------
    TypeError
        If one is not of its kind.
    ValueError
        If a name of a dict cannot be that of a folder.
    """
    given = {MODEL: model, OPTIMIZER: optimizer, LR_SCHEDULER: lr_scheduler, DATALOADER: dataloader}
    return [part for kind, value in given.items() for part in _parts(kind, value)]


def pairs(parts: Sequence[Part]) -> list[tuple[str, nn.Module, Optimizer | None]]:
    """Name, model, and the optimizer of the same name, if there is one, of each model.

    Raises
    ------
    ValueError
        If there is an optimizer whose model is not given.
    """
    optimizers = {part.name: part.value for part in parts if part.kind == OPTIMIZER}
    found = [(part.name, part.value, optimizers.pop(part.name, None)) for part in parts if part.kind == MODEL]
    if optimizers:
        names = ", ".join(f"optimizer {name!r}" if name else "optimizer" for name in optimizers)
        raise ValueError(
            f"{names}: layout='dcp' stores states by the names of parameters; give the model as well, and under the "
            "same name where there are several"
        )
    return found


def _parts(kind: str, value: Any) -> Iterator[Part]:
    if value is None:
        return
    if kind == OPTIMIZER and (whole := whole_of(value)) is not None:
        value = whole
    if isinstance(value, list | tuple):
        raise TypeError(f"{kind}=[...] has no names: give several as a dict, such as {kind}={{'a': ..., 'b': ...}}")
    for name, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        if name and not (isinstance(name, str) and _FOLDER_NAME.fullmatch(name)):
            raise ValueError(f"{kind}: {name!r} becomes the name of a folder: use letters, digits, '_' and '-'")
        _check(kind, each)
        yield Part(kind, name, each)


def _check(kind: str, value: Any) -> None:
    if kind == MODEL and not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a dict of them, got a {type(value).__name__}")
    if kind == OPTIMIZER and not isinstance(value, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or a dict of them, got a {type(value).__name__}")
    if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
        hint = ""
        if kind == DATALOADER:
            hint = (
                ": it does not know how far it is. Use the loader that booster.plugin.prepare_dataloader returns, or "
                "torchdata's StatefulDataLoader"
            )
        raise TypeError(f"{kind} must have state_dict and load_state_dict, and a {type(value).__name__} has not{hint}")
