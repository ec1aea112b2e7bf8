"""The power fails while a checkpoint is saved, at any call: the old one is there or the new one, whole.

Once the save has returned (in the background: `wait_until_finished`) it is the new one. What may be on the disk is what
POSIX promises and no more (`tests/power_loss.py`), so a missing ``fsync`` is seen here, and on no real disk for years.
The disk tier has nothing to lose: its files have no names and do not outlive the process.
"""

import argparse
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from operations import folder_in_memory, intercepted
from power_loss import Disk, Recorded, trees, write_tree
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam

_WIDTH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the combinations that are tried")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {name: _fails(form, arguments.seed) for name, form in _FORMS.items()}
    return {"ok": all(not each["lost"] for each in found.values()), **found}


@dataclass(frozen=True)
class _Form:
    """One way to save, and to find out what is there."""

    save: Callable[["_Training", Path], None]
    load: Callable[["_Training", nn.Module, Path], None]


class _Training:
    """A small model, boosted; its weights change with each step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model: Any = _model()
        optimizer: Any = HybridAdam(model.parameters(), lr=1e-2)
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, host_memory="8MiB"))
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    def step(self) -> None:
        loss = self.model(torch.ones(2, _WIDTH)).square().mean()
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [value.clone() for value in self.model.state_dict().values()]


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))


def _save(training: _Training, folder: Path) -> None:
    training.booster.save(folder, model=training.model, optimizer=training.optimizer)


def _save_behind(training: _Training, folder: Path) -> None:
    training.booster.save(folder, model=training.model, optimizer=training.optimizer, use_async=True)
    training.booster.wait_until_finished()


def _load(training: _Training, model: nn.Module, folder: Path) -> None:
    training.booster.load(folder, model=model, rng=False)


def _save_file(training: _Training, folder: Path) -> None:
    training.booster.save_model(training.model, str(folder / "model.safetensors"))


def _load_file(training: _Training, model: nn.Module, folder: Path) -> None:
    training.booster.load_model(model, str(folder / "model.safetensors"))


_FORMS = {
    "save": _Form(_save, _load),
    "save in the background": _Form(_save_behind, _load),
    "save_model": _Form(_save_file, _load_file),
}


def _fails(form: _Form, seed: int) -> dict[str, Any]:
    """Let the power fail at each call of a save; how often what was found, and what was lost."""
    training, outcomes, lost = _Training(), Counter[str](), list[str]()
    with folder_in_memory() as root:
        work = root / "checkpoints"
        work.mkdir()
        form.save(training, work)
        old = training.weights()
        training.step()
        new = training.weights()
        disk, recorded = Disk.of(work), Recorded()
        with intercepted(root, recorded):
            form.save(training, work)
        calls = [call for call in recorded.calls if work in (call.path, *call.path.parents)]
        for number, tree in trees(work, disk, calls, random.Random(seed)):
            shutil.rmtree(work)
            work.mkdir()
            write_tree(work, tree)
            found = _found(form, training, work, old, new)
            outcomes[found] += 1
            if found not in ("old", "new") or (found == "old" and number == len(calls)):
                lost.append(f"{found} after {number} of {len(calls)} calls")
    return {"calls": len(calls), "states": sum(outcomes.values()), **outcomes, "lost": lost[:5]}


def _found(form: _Form, training: _Training, folder: Path, old: list[torch.Tensor], new: list[torch.Tensor]) -> str:
    model = _model()
    try:
        form.load(training, model, folder)
    except (CheckpointError, OSError):
        return "nothing"
    got = list(model.state_dict().values())
    for name, wanted in (("new", new), ("old", old)):
        if all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
            return name
    return "neither"
