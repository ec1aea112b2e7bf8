"""A model and an optimizer that are loaded must have been saved in the same state of training; see `StateId`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gemini.errors import CheckpointError
from gemini.nn.optimizer.managed import ManagedOptimizer

from ..step.state_id import MODEL, OPTIMIZER, StateId
from .safetensors_stream import ID_KEY
from .swapped import steps_of


def state_id_of(of: nn.Module | Optimizer) -> StateId | None:
    """Names the state of a boosted model, or of its optimizer; None where nothing is boosted, or several models are."""
    found = list(steps_of(of))
    return found[0].state_id if len(found) == 1 else None


def id_metadata(of: nn.Module | Optimizer) -> Mapping[str, str]:
    """What files of this state say beside their tensors."""
    state_id = state_id_of(of)
    return {} if state_id is None else {ID_KEY: state_id.text}


@dataclass(frozen=True, slots=True)
class Checked:
    """Files for a model or an optimizer that have been checked, and can be loaded."""

    of: nn.Module | Optimizer
    path: Path
    id: str | None
    """Of the state that was saved; None if it has none, or any will do."""
    assign: Callable[[], Any]

    def load(self) -> Any:
        """Replace the values; returns what ``assign`` does."""
        tell_loaded(self.of, self.id)
        return self.assign()


def check_pairs(found: Sequence[Checked]) -> None:
    """See whether files that are loaded together, or after others without a step in between, are of one state.

    Raises
    ------
    CheckpointError
        If they are not.
    """
    for each in found:
        state_id, kind = state_id_of(each.of), _kind(each.of)
        if state_id is None or each.id is None:
            continue
        halves = [half for half in found if state_id_of(half.of) is state_id and _kind(half.of) != kind]
        if not halves and each.id == state_id.text:
            continue  # saved since the other one was loaded
        other = halves[0].id if halves else state_id.awaited(kind)
        if other is not None and other != each.id:
            named = str(halves[0].path) if halves else f"the {OPTIMIZER if kind == MODEL else MODEL} loaded before it"
            raise CheckpointError(
                f"{each.path} was saved in another state of training than {named}: together they would train on to "
                "other numbers than either run. Load a model and an optimizer that were saved together (booster.save "
                f"does so), or take them as they are with strict=False. The {kind} is as it was"
            )


def tell_loaded(of: nn.Module | Optimizer, id: str | None) -> None:
    """Values are about to be replaced: by those of a file of a state, or by any others."""
    if isinstance(of, ManagedOptimizer) and of.whole is not of:
        id = None  # the states of the other optimizers of the model are to come
    if (state_id := state_id_of(of)) is not None:
        state_id.loaded(_kind(of), id)


def _kind(of: nn.Module | Optimizer) -> str:
    return MODEL if isinstance(of, nn.Module) else OPTIMIZER
