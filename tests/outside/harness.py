"""Run one use of parameters, gradients or states between training steps, in plain PyTorch and managed, and compare."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from outside.comparing import described, differing, frozen
from outside.models import MODELS
from outside.placements import Placement, Refusal
from outside.running import Training
from parity import check_at_rest
from torch import Tensor

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Use:
    """What user code does between two training steps.

    It returns what it has seen, for comparison: tensors, numbers and strings in lists, tuples and dicts.
    """

    topic: str
    name: str
    run: Callable[[Training], Any]
    model: str = "layers"
    refusal: Refusal | None = None
    may_be_equal: bool = False
    """The use may work as well, if it is then right."""
    ends_training: bool = False
    """Nothing is left to train."""
    needs_host: bool = False
    """Plain PyTorch can do it with parameters in RAM only."""
    library: str | None = None
    """What has to be installed beside what the model needs."""

    @property
    def libraries(self) -> list[str]:
        return [library for library in (MODELS[self.model].library, self.library) if library is not None]

    def judge(self, placement: Placement, folder: str) -> "Verdict":
        """Run managed, and compare with plain PyTorch."""
        return judge(self, placement, folder)


class Catalogue:
    """The uses of one file, by name."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.uses: dict[str, Use] = {}

    def add(self, model: str = "layers", **options: Any) -> Callable[[Callable[[Training], Any]], Callable[..., Any]]:
        def register(function: Callable[[Training], Any]) -> Callable[[Training], Any]:
            name = f"{self.topic}: {function.__name__.replace('_', ' ').strip()}"
            assert name not in self.uses, f"two uses are called {name!r}"
            self.uses[name] = Use(self.topic, name, function, model, **options)
            return function

        return register


@dataclass(frozen=True)
class Outcome:
    """All that a run left. Nothing in it shares memory with the run."""

    losses: list[float]
    """Of the steps after the use."""
    returned: Any
    weights: dict[str, Tensor]
    states: dict[str, Any]
    groups: list[Any]


@dataclass(frozen=True)
class Verdict:
    """How a managed run compares with plain PyTorch."""

    kind: str
    """``equal``, ``refused``, ``WRONG`` (other numbers) or ``ERROR`` (an exception that the use does not expect)."""
    text: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind in ("equal", "refused")


def judge(use: Use, placement: Placement, folder: str) -> Verdict:
    """Run ``use`` managed, and compare it with plain PyTorch."""
    run = Training(MODELS[use.model], placement, folder)
    run.train(2)
    placement.check(run.model)
    torch.manual_seed(11)
    try:
        returned = frozen(use.run(run))
    except Exception as error:
        refusals = [refusal for refusal in (use.refusal, placement.refusal) if refusal is not None]
        if any(refusal.fits(error) for refusal in refusals):
            return _judge_refusal(run, use, described(error))
        return Verdict("ERROR", described(error))
    if use.refusal is not None and not use.may_be_equal:
        return Verdict("WRONG", f"not refused; due: {use.refusal.way_out}")
    try:
        outcome = finish(run, returned, 0 if use.ends_training else 2)
        check_at_rest(run.model)
    except Exception as error:
        return Verdict("ERROR", f"later {described(error)}")
    found = list(differences(outcome, plain(use)))
    return Verdict("WRONG", "; ".join(found)) if found else Verdict("equal")


def _judge_refusal(run: Training, use: Use, message: str) -> Verdict:
    """Compare a run whose use was refused with plain PyTorch that never tried it."""
    try:
        run.optimizer.zero_grad()
        has_stepped = {float(state["step"]) for state in run.optimizer.state_dict()["state"].values()} != {2.0}
        outcome = finish(run, None)
        check_at_rest(run.model)
    except Exception as error:
        return Verdict("ERROR", f"refused, then {described(error)}")
    if has_stepped:  # by what the use did before; what that came to is not known
        found = [] if all(math.isfinite(loss) for loss in outcome.losses) else ["the loss is not finite"]
    else:
        found = list(differences(outcome, without_use(use.model, run.batches - 4)))
    return Verdict("WRONG", "refused, but then " + "; ".join(found)) if found else Verdict("refused", message)


@cache
def plain(use: Use) -> Outcome:
    """The outcome in plain PyTorch."""
    with TemporaryDirectory() as folder:
        run = Training(MODELS[use.model], None, folder)
        run.train(2)
        torch.manual_seed(11)
        return finish(run, frozen(use.run(run)), 0 if use.ends_training else 2)


@cache
def without_use(model: str, skipped: int) -> Outcome:
    """The outcome of training alone in plain PyTorch, where ``skipped`` batches are not trained on."""
    run = Training(MODELS[model], None, "")
    run.train(2)
    for _ in range(skipped):
        run.batch()
    return finish(run, None)


def finish(run: Training, returned: Any, steps: int = 2) -> Outcome:
    """Train on and take down what is left."""
    torch.manual_seed(12)
    run.train(steps)
    saved = run.optimizer.state_dict()
    return Outcome(
        losses=run.losses[len(run.losses) - steps :],
        returned=returned,
        weights=frozen(dict(run.model.state_dict())),
        states={
            str(index): {name: frozen(value) if name != "step" else float(value) for name, value in state.items()}
            for index, state in saved["state"].items()
        },
        groups=[{name: frozen(group[name]) for name in HYPERPARAMETERS} for group in saved["param_groups"]],
    )


def differences(ours: Outcome, plain: Outcome) -> Iterator[str]:
    """Name what is not bit for bit the same; NaN equals nothing."""
    for part in ("returned", "losses", "weights", "states", "groups"):
        found = differing(part, getattr(ours, part), getattr(plain, part))
        if found:
            yield found
