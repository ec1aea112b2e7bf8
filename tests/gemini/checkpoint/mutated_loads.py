"""Loads mutated checkpoints of every kind, and judges what comes of it.

A subject has a checkpoint, the same of another step, a run that is in a third state, and a way to load.
"""

import contextlib
import copy
import functools
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import boost, gpt2, train
from mutations import SEALS, mutations_of
from state_uses import same

from gemini.booster import Booster
from gemini.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from gemini.errors import CheckpointError

SECONDS, LETTERS = 20, 6000
"""What a load may take, and its message."""
UNREAD = ("generation_config.json", "README.md")
UNSEALED = ("adapter_config.json",)
"""Its format is that of peft, without a checksum."""
BAD = ("wrong values", "changed in spite of the error", "other error", "error without the file", "long", "slow", "torn")


class Run:
    """A tiny GPT-2 with its optimizer and a scheduler."""

    def __init__(self, steps: int) -> None:
        self.booster, self.model, self.optimizer = boost(gpt2(n_layer=1, n_embd=8, n_positions=16, vocab_size=96))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 9)
        self.train(steps)

    def train(self, steps: int) -> None:
        train(self.booster, self.model, self.optimizer, range(steps), self.scheduler)

    def state(self) -> Any:
        attributes = {name: value for name, value in vars(self.scheduler).items() if name != "optimizer"}
        return copy.deepcopy(
            (self.model.state_dict(), self.optimizer.state_dict(), attributes, torch.random.get_rng_state())
        )

    def put_back(self, state: Any) -> None:
        model, optimizer, attributes, drawn = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        vars(self.scheduler).update(attributes)
        torch.random.set_rng_state(drawn)


class Adapter:
    """A base model that gets adapters from a folder."""

    def __init__(self, steps: int) -> None:
        from peft import LoraConfig

        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        self.base = gpt2(n_layer=1, n_embd=8, n_positions=16)
        self.model = Booster().enable_lora(copy.deepcopy(self.base), config)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(float(steps)) if p.requires_grad else None
        self.first = self.model

    def state(self) -> Any:
        return copy.deepcopy((self.base.state_dict(), self.model.state_dict()))

    def put_back(self, state: Any) -> None:
        self.model = self.first

    def train(self, steps: int) -> None:
        """Nothing to try."""

    def load(self, path: Path) -> None:
        self.model = Booster().enable_lora(copy.deepcopy(self.base), str(path))


@dataclass(frozen=True, slots=True)
class Subject:
    """One kind of checkpoint."""

    name: str
    save: Callable[[Any, Path], object]
    load: Callable[[Any, Path], object]
    make: Callable[[int], Any] = Run
    binds: bool = False
    """Its files say which belong together."""


def _bin(run: Run, path: Path) -> None:
    run.booster.save_model(run.model, path, use_safetensors=False)


def _sharded_bin(run: Run, path: Path) -> None:
    run.booster.save_model(run.model, path, shard=True, size_per_shard="2KB", use_safetensors=False)


def _save(run: Run, path: Path) -> None:
    parts = {"model": run.model, "optimizer": run.optimizer, "lr_scheduler": run.scheduler}
    run.booster.save(path, **parts, extra={"epoch": 3}, size_per_shard="2KB")


def _load(run: Run, path: Path) -> None:
    run.booster.load(path, model=run.model, optimizer=run.optimizer, lr_scheduler=run.scheduler)


def _load_model(run: Run, path: Path) -> None:
    run.booster.load_model(run.model, path)


def _load_optimizer(run: Run, path: Path) -> None:
    run.booster.load_optimizer(run.optimizer, path)


SUBJECTS = (
    Subject("model", lambda run, path: run.booster.save_model(run.model, path), _load_model),
    Subject(
        "shards",
        lambda run, path: run.booster.save_model(run.model, path, shard=True, size_per_shard="2KB"),
        _load_model,
        binds=True,
    ),
    Subject("bin", _bin, _load_model),
    Subject("shards of bin", _sharded_bin, _load_model, binds=True),
    Subject(
        "optimizer", lambda run, path: run.booster.save_optimizer(run.optimizer, path), _load_optimizer, binds=True
    ),
    Subject(
        "optimizer.pt",
        lambda run, path: run.booster.save_optimizer(run.optimizer, path / "optimizer.pt"),
        lambda run, path: _load_optimizer(run, path / "optimizer.pt"),
    ),
    Subject(
        "scheduler",
        lambda run, path: run.booster.save_lr_scheduler(run.scheduler, path / "lr_scheduler.pt"),
        lambda run, path: run.booster.load_lr_scheduler(run.scheduler, path / "lr_scheduler.pt"),
    ),
    Subject("checkpoint", _save, _load, binds=True),
    Subject(
        "adapter",
        lambda run, path: Booster().save_lora_as_pretrained(run.model, str(path), use_safetensors=True),
        Adapter.load,
        Adapter,
    ),
)


@functools.cache
def _made(make: Callable[[int], Any], steps: int) -> Any:
    """The same for all subjects: building takes longer than all loads."""
    return make(steps)


class Judge:
    """Mutates and loads one subject again and again."""

    def __init__(self, subject: Subject, folder: Path, seed: int) -> None:
        self.subject = subject
        self.rng = random.Random(f"{subject.name} {seed}")
        self.good, self.other, self.tried = (folder / name for name in ("good", "other", "tried"))
        subject.save(_made(subject.make, 2), self.good)
        subject.save(_made(subject.make, 3), self.other)
        self.run = _made(subject.make, 1)
        self.before = self.run.state()
        subject.load(self.run, self.good)
        self.expected = self.run.state()
        self.run.put_back(self.before)
        files = (p for p in self.good.rglob("*") if p.is_file() and p.name not in UNREAD)
        self.files = sorted(p.relative_to(self.good) for p in files)
        assert not same(self.before, self.expected)

    def try_one(self) -> tuple[str, str]:
        """What was done, and the outcome."""
        file = self.rng.choice(self.files)
        mutations = mutations_of(file.name)
        name = self.rng.choice(list(mutations))
        shutil.rmtree(self.tried, ignore_errors=True)
        shutil.copytree(self.good, self.tried, symlinks=True)
        data, other, path = (self.good / file).read_bytes(), (self.other / file).read_bytes(), self.tried / file
        path.write_bytes(mutated := mutations[name](self.rng, data, other))
        self._seal(path, name)
        may_be_another = name in SEALS or file.name in UNSEALED or (mutated == other and not self.subject.binds)
        outcome = self._outcome(path, may_be_another) if mutated != data else "nothing was mutated"
        if Path("executed").exists():
            outcome = "other error: code was run"
            Path("executed").unlink()
        return f"{self.subject.name}: {file.name}: {name}", outcome

    def _seal(self, path: Path, name: str) -> None:
        """Have the manifest say what a mutation made, so that what reads the file itself has to see it."""
        if name in SEALS and path.name != MANIFEST_NAME and (path.parent / MANIFEST_NAME).exists():
            manifest = Manifest.read(path.parent)
            files = {**manifest.files, path.name: FileRecord.of(path)}
            text = Manifest(id=manifest.id, world_size=1, parts=manifest.parts, files=files).text()
            (path.parent / MANIFEST_NAME).write_text(text)

    def _outcome(self, path: Path, may_be_another: bool) -> str:
        try:
            with _at_most(SECONDS):
                self.subject.load(self.run, self.tried)
        except CheckpointError as error:
            return self._refused(path, str(error))
        except TimeoutError:
            return "slow"
        except Exception as error:
            return f"other error: {type(error).__name__}: {str(error)[:300]}"
        return self._loaded(may_be_another)

    def _refused(self, path: Path, message: str) -> str:
        if not same(self.run.state(), self.before):
            self.run.put_back(self.before)
            return f"changed in spite of the error: {message[:300]}"
        if path.name not in message and str(self.tried) not in message:
            return f"error without the file: {message[:300]}"
        return f"long: {len(message)}" if len(message) > LETTERS else "refused"

    def _loaded(self, may_be_another: bool) -> str:
        found = self.run.state()
        if same(found, self.expected):
            outcome = "the same values"
        elif may_be_another:
            outcome = "another state, whole"
            try:
                self.run.train(1)
            except Exception as error:
                outcome = f"torn: {type(error).__name__}: {str(error)[:300]}"
        else:
            outcome = "wrong values"
        self.run.put_back(self.before)
        return outcome


def outcomes(folder: Path, count: int, seed: int, subjects: tuple[Subject, ...] = SUBJECTS) -> Counter[tuple[str, str]]:
    """Judge ``count`` mutations, as many of each subject. The working folder is ``folder``."""
    found: Counter[tuple[str, str]] = Counter()
    for index, subject in enumerate(subjects):
        judge = Judge(subject, folder / str(index), seed)
        done = 0
        while done < count * (index + 1) // len(subjects) - count * index // len(subjects):
            what, outcome = judge.try_one()
            if outcome != "nothing was mutated":
                done += 1
                found[what, outcome] += 1
    return found


def bad(found: Counter[tuple[str, str]]) -> list[str]:
    return sorted(f"{what} -> {outcome}" for what, outcome in found if outcome.startswith(BAD))


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
