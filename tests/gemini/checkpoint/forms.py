"""Everything that can be saved, each over an older checkpoint, and which of the two is there afterwards."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_cases import VOCABULARY, boost, gpt2, train
from torch import Tensor, nn

from gemini.checkpoint import (
    load_lr_scheduler,
    load_model,
    load_optimizer,
    named_tensors,
    save_lora,
    save_lr_scheduler,
    save_model,
    save_optimizer,
)
from gemini.errors import CheckpointError

SHARDED = {"shard": True, "size_per_shard": "3KiB"}
TORCH = {"use_safetensors": False}
REFUSED, OLD, NEW = 0, 1, 3
PARTS = ("model", "optimizer", "scheduler")


class Small(nn.Module):
    """A language model of five tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.middle(self.embedding(input_ids)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Small()


def transformer(seed: int) -> nn.Module:
    """One that is saved with a configuration."""
    return gpt2(seed, n_layer=1, n_embd=8, n_positions=16)


class Subject:
    """A small model in training, and its states at the steps of its checkpoints."""

    def __init__(self, build: Callable[[int], nn.Module], seed: int = 0) -> None:
        self.build = build
        self.booster, self.model, self.optimizer = boost(build(seed))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.step = 0
        self.states: dict[int, dict[str, Any]] = {}

    def go_to(self, step: int) -> None:
        train(self.booster, self.model, self.optimizer, range(self.step, step), self.scheduler)
        self.step = step
        self.states[step] = {part: state_of(self, part) for part in PARTS}

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}

    @cached_property
    def other(self) -> "Subject":
        """Where checkpoints are loaded."""
        return Subject(self.build, seed=1)


def state_of(subject: Subject, part: str) -> Any:
    if part == "model":
        return dict(named_tensors(subject.model))
    if part == "optimizer":
        return [{k: v.clone() for k, v in s.items()} for s in subject.optimizer.state_dict()["state"].values()]
    return subject.scheduler.state_dict()


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


@dataclass(frozen=True)
class Form:
    """One way to save."""

    name: str
    parts: tuple[str, ...]
    save: Callable[[Subject, Path], None]
    load: Callable[[Subject, Path], None]
    save_older: Callable[[Subject, Path], None] | None = None
    """None: as `save`."""
    is_pair: bool = False
    """Two saves, between which the files are of two states; that has to be refused."""
    build: Callable[[int], nn.Module] = lambda seed: small(seed)
    check_tidy: Callable[[Path, list[str]], None] = lambda folder, files: check_same_files(folder, files)
    """Nothing is left of saves that did not end; it also gets the files of an undisturbed save."""

    def found(self, subject: Subject, folder: Path) -> int:
        """The step of the checkpoint, whole, or `REFUSED`.

        Raises
        ------
        CheckpointError
            If it does not load.
        AssertionError
            If it is of no step: a mix.
        """
        try:
            self.load(subject.other, folder)
        except CheckpointError as error:
            if self.is_pair and "was saved in another state of training" in str(error):
                return REFUSED
            raise
        there = {part: state_of(subject.other, part) for part in self.parts}
        for step, state in subject.states.items():
            if all(is_same(there[part], state[part]) for part in self.parts):
                return step
        raise AssertionError(f"{self.name}: what was loaded is neither the old nor the new state")


@dataclass
class Prepared:
    """A form with the older checkpoint on the disk and the newer state in the model."""

    form: Form
    subject: Subject
    folder: Path
    work: Path
    """Where it is saved, over a copy of the older checkpoint."""

    def begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder, self.work, symlinks=True)

    def save(self) -> None:
        self.form.save(self.subject, self.work)

    def found(self) -> int:
        return self.form.found(self.subject, self.work)

    @cached_property
    def files(self) -> list[str]:
        """What an undisturbed save leaves."""
        self.begin()
        self.save()
        return listing(self.work)

    def check_later_saves(self) -> None:
        """A later save works, and nothing is left of those that did not end."""
        self.save()
        assert self.found() == NEW
        self.form.check_tidy(self.work, self.files)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check_same_files(folder: Path, files: list[str]) -> None:
    assert listing(folder) == files


def check_numbered(folder: Path, keep: int) -> None:
    """Whole checkpoints, no more than are to be kept, and the name of the last one."""
    numbered = sorted(path for path in folder.iterdir() if path.name != "latest")
    assert all(path.name.startswith("checkpoint-") and (path / "manifest.json").is_file() for path in numbered)
    assert 1 <= len(numbered) <= keep
    assert os.readlink(folder / "latest") == numbered[-1].name


@contextmanager
def prepared(form: Form, folder: Path) -> Iterator[Prepared]:
    subject = Subject(form.build)
    subject.go_to(OLD)
    (folder / "old").mkdir(parents=True)
    (form.save_older or form.save)(subject, folder / "old")
    subject.go_to(NEW)
    yield Prepared(form, subject, folder / "old", folder / "work")
    shutil.rmtree(folder)


# -- the forms


def _model(
    name: str, options: dict[str, Any], older: dict[str, Any] | None = None, file: str = ".", **more: Any
) -> Form:
    return Form(
        name,
        ("model",),
        lambda s, folder: save_model(s.model, folder / file, **options),
        lambda s, folder: load_model(s.model, folder / file),
        None if older is None else (lambda s, folder: save_model(s.model, folder / file, **older)),
        **more,
    )


def _committed(name: str, keep: int) -> Form:
    return Form(
        name,
        PARTS,
        lambda s, folder: s.booster.save(folder, **s.parts, keep=keep) and None,
        lambda s, folder: s.booster.load(folder, **s.parts) and None,
        check_tidy=lambda folder, _: check_numbered(folder, keep),
    )


def _optimizer(name: str, options: dict[str, Any], file: str = ".") -> Form:
    return Form(
        name,
        ("optimizer",),
        lambda s, folder: save_optimizer(s.optimizer, folder / file, **options),
        lambda s, folder: load_optimizer(s.optimizer, folder / file),
    )


def _save_pair(subject: Subject, folder: Path) -> None:
    save_model(subject.model, folder)
    save_optimizer(subject.optimizer, folder)


def _load_pair(subject: Subject, folder: Path) -> None:
    load_model(subject.model, folder)
    load_optimizer(subject.optimizer, folder)


def _lora(seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = transformer(0)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def _load_lora(subject: Subject, folder: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    model = subject.model
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


FORMS = [
    _model("model file", {}, file="m.safetensors"),
    _model("torch file", {}, file="m.pt"),
    _model("folder", {}, build=transformer),
    _model("sharded", SHARDED, build=transformer),
    _model("sharded over one file", SHARDED, {}),
    _model("one file over sharded", {}, SHARDED),
    _model("other shards", SHARDED, {"shard": True, "size_per_shard": "1KiB"}),
    _model("torch over sharded", TORCH, SHARDED),
    _model("sharded over torch", SHARDED, TORCH),
    _committed("checkpoint", keep=3),
    _committed("checkpoint that replaces one", keep=1),
    Form("pair", ("model", "optimizer"), _save_pair, _load_pair, is_pair=True),
    _optimizer("optimizer", {}),
    _optimizer("sharded optimizer", SHARDED),
    _optimizer("optimizer file", {}, file="optimizer.pt"),
    Form(
        "scheduler",
        ("scheduler",),
        lambda s, folder: save_lr_scheduler(s.scheduler, folder / "scheduler.pt"),
        lambda s, folder: load_lr_scheduler(s.scheduler, folder / "scheduler.pt"),
    ),
    Form("lora", ("model",), lambda s, folder: save_lora(s.model, folder), _load_lora, build=_lora),
    Form(
        "lora over safetensors",
        ("model",),
        lambda s, folder: save_lora(s.model, folder),
        _load_lora,
        lambda s, folder: save_lora(s.model, folder, use_safetensors=True),
        build=_lora,
    ),
]
