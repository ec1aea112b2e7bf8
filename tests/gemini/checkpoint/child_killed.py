"""Processes that die while they overwrite a checkpoint: ``child_killed.py FOLDER``. Prints what was seen.

Every save writes one number into all tensors, so that a mixture of two checkpoints shows.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from gemini.checkpoint import load_model, load_optimizer, save_model, save_optimizer
from gemini.nn.optimizer import HybridAdam

FORMS = {
    "file": ("m.safetensors", {}),
    "torch": ("m.pt", {}),
    "single": ("single", {}),
    "sharded": ("sharded", {"shard": True, "size_per_shard": "300KiB"}),
}


def build() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def fill(model: nn.Module, number: int) -> HybridAdam:
    """The model and the states of its optimizer hold nothing but ``number``."""
    optimizer = HybridAdam(model.parameters())
    for parameter in model.parameters():
        parameter.data.fill_(number)
        full = torch.full_like(parameter, number)
        optimizer.state[parameter] = {"step": torch.tensor(float(number)), "exp_avg": full, "exp_avg_sq": full.clone()}
    return optimizer


def save(target: Path, options: dict, number: int) -> None:
    model = build()
    optimizer = fill(model, number)
    save_model(model, target, **options)
    if target.suffix == "":
        save_optimizer(optimizer, target, **options)


def seen(target: Path) -> int:
    """The number in the checkpoint; an error if there are two, or none."""
    model = build()
    load_model(model, target)
    (number,) = {float(value) for parameter in model.parameters() for value in parameter.unique()}
    if target.suffix == "":
        optimizer = fill(build(), -1)
        load_optimizer(optimizer, target)
        numbers = {float(v) for state in optimizer.state.values() for t in state.values() for v in t.unique()}
        assert len(numbers) == 1, numbers
    return int(number)


def die_at_random(target: Path, options: dict, rng: random.Random) -> Counter:
    outcomes: Counter = Counter()
    for _ in range(8):
        before = seen(target)
        writer = os.fork()
        if writer == 0:
            while True:
                before += 1
                save(target, options, before)
        time.sleep(rng.uniform(0.001, 0.08))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        after = seen(target)
        assert after >= before
        outcomes["old" if after == before else "newer"] += 1
    return outcomes


def die_at_each_change(target: Path, options: dict) -> Counter:
    """One process per call that changes the folder; it dies at this call."""
    outcomes: Counter = Counter()
    for count in range(1000):
        before = seen(target)
        writer = os.fork()
        if writer == 0:
            die_after(count)
            save(target, options, before + 1)
            os._exit(0)
        _, status = os.waitpid(writer, 0)
        after = seen(target)
        assert after in (before, before + 1)
        if os.waitstatus_to_exitcode(status) == 0:
            assert after == before + 1
            return outcomes
        outcomes["old" if after == before else "new"] += 1
    raise AssertionError("a save without end")


def die_after(count: int) -> None:
    left = [count]

    def deadly(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "link", "unlink", "rmdir", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    rng = random.Random(7)
    results = {}
    for form, (name, options) in FORMS.items():
        target = Path(sys.argv[1]) / name
        save(target, options, 1)
        results[form] = [die_at_random(target, options, rng), die_at_each_change(target, options)]
        save(target, options, 1)  # removes what the dead have left
        folder = target if target.suffix == "" else target.parent
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], form
    print(json.dumps(results))
