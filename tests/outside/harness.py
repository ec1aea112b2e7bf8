"""Run one use of parameters, gradients or states between training steps, in plain PyTorch and managed, and compare."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from outside.models import MODELS, Model
from parity import check_at_rest
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Refusal:
    """An error that a use must end with, before it has changed anything."""

    error: type[BaseException] | tuple[type[BaseException], ...]
    way_out: str
    """A pattern of the part of the message that says what to do instead."""

    def fits(self, error: BaseException) -> bool:
        """Whether ``error`` is this refusal; torch's own errors don't speak of chunks or boosting."""
        message = str(error)
        is_ours = re.search(r"boost|chunk|kept on disk", message) is not None
        return is_ours and isinstance(error, self.error) and re.search(self.way_out, message) is not None


ROOM_FOR_DISK = 300 << 10
"""Bytes of RAM through which chunks come from disk and go there, besides room for one of them."""

ON_DISK = Refusal(RuntimeError, r"p\.grad.*kept on disk.*(clip_grad_by_norm|host_memory)")
"""A gradient that has no memory cannot be shown in ``p.grad``."""


@dataclass(frozen=True)
class Placement:
    """Where the model data of a managed run are."""

    name: str
    device_share: float | None = None
    """Room for full copies, as a part of the weights' bytes; none: full copies have all the room they need."""
    host_weights: float | None = None
    """Room for homes in RAM, in multiples of the weights' (and gradients') bytes; none: all homes are in RAM."""
    device: str = "cpu"
    """Where batches go."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `GeminiPlugin`."""
    refusal: Refusal | None = None
    """An error with which uses of gradients may end here."""
    topics: tuple[str, ...] | None = None
    """The topics that are worth a run here; all of them if none is named."""

    def plugin(self, model: Any, folder: str) -> GeminiPlugin:
        weights = sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        options: dict[str, Any] = {
            "chunk_config_dict": {1: {"chunk_size": 256}},
            "host_memory": "64MiB",
            **self.options,
        }
        if self.device_share is not None:
            options["device_memory"] = int(weights * self.device_share)
        if self.host_weights is not None:
            options["host_memory"] = ROOM_FOR_DISK + largest + int(self.host_weights * (weights + gradients))
            options["offload_dir"] = folder
        return GeminiPlugin(precision="fp32", telemetry=False, **options)

    def check(self, model: Any) -> None:
        """Fail if this model's chunks don't have to move."""
        stats = model.memory_stats()
        assert self.device_share is None or stats["move/evict_count"], (
            "nothing was evicted: this placement shows nothing"
        )
        assert self.host_weights is None or stats["disk/used_bytes"], "nothing is on disk: this placement shows nothing"


ON_SEVERAL_TIERS = ("gradients", "states", "libraries", "trainings")
"""Topics in which homes of several kinds matter, not only the weights'."""

PLACEMENTS = {
    placement.name: placement
    for placement in (
        Placement("roomy"),  # full copies are homes
        Placement("tight", device_share=0.35),  # full copies move
        Placement("disk", host_weights=0.0, refusal=ON_DISK),  # all homes are on disk, gradients too
        Placement("mixed", device_share=0.35, host_weights=1.0, topics=ON_SEVERAL_TIERS),  # moments are on disk
    )
}


class Training:
    """A model in training, plain or managed: what a use works on.

    Attributes
    ----------
    model, optimizer
        As `boost` returned them.
    booster
        None in plain PyTorch.
    given_optimizer, given_parameters
        From before `boost`; code of users still has them.
    batches
        How many were drawn.
    kept
        For what a use wants to keep alive until the end.
    """

    def __init__(self, kind: Model, placement: Placement | None, folder: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model: Any = kind.build()
        self.given_parameters = list(self.model.parameters())
        self.given_optimizer = kind.optimizer([p for p in self.given_parameters if p.requires_grad])
        self.optimizer: Any = self.given_optimizer
        self.booster: Booster | None = None
        self.device = "cpu"
        self.folder = folder
        if placement is not None:
            self.device = placement.device
            self.booster = Booster(plugin=placement.plugin(self.model, folder))
            self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)
        self.losses: list[float] = []
        self.kept: list[Any] = []
        self.batches = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The innermost modules that have parameters."""
        return [module for module in self.model.modules() if any(True for _ in module.parameters(recurse=False))]

    def batch(self) -> Tensor:
        """The next batch; the same one in every run."""
        self.batches += 1
        return self.kind.batch(torch.Generator().manual_seed(self.batches)).to(self.device)

    def loss(self) -> Tensor:
        loss = self.kind.loss(self.model, self.batch())
        self.losses.append(loss.item())
        return loss

    def backward(self, loss: Tensor | None = None) -> Tensor:
        """Compute the next loss if there is none, and its gradients."""
        loss = self.loss() if loss is None else loss
        if self.booster is None:
            loss.backward()
        else:
            self.booster.backward(loss, self.optimizer)
        return loss

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def unmanaged(self, seed: int = 3) -> Any:
        """A second model of the same kind, with other weights, that nobody manages."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.kind.build()


def in_another_thread(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, or raise what it raises, in a thread of its own; a minute is enough."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


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


def frozen(value: Any) -> Any:
    """Copy what a use returned, so that it can be compared later."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if isinstance(value, numpy.ndarray | numpy.generic):
        return torch.from_numpy(numpy.array(value))
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"a use returned a {type(value).__name__}, which cannot be compared")


def differences(ours: Outcome, plain: Outcome) -> Iterator[str]:
    """Name what is not bit for bit the same; NaN equals nothing."""
    for part in ("returned", "losses", "weights", "states", "groups"):
        found = differing(part, getattr(ours, part), getattr(plain, part))
        if found:
            yield found


def differing(where: str, ours: Any, plain: Any) -> str:
    """Name the first part that is not the same, and how many others are not; nothing if all is."""
    found = list(_unequal(where, ours, plain))
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") if found else ""


def _unequal(where: str, ours: Any, plain: Any) -> Iterator[str]:
    if isinstance(plain, Tensor):
        if not isinstance(ours, Tensor):
            yield f"{where}: {ours!r} for a tensor"
        elif (ours.dtype, ours.shape) != (plain.dtype, plain.shape):
            yield f"{where}: {ours.dtype} {tuple(ours.shape)} for {plain.dtype} {tuple(plain.shape)}"
        elif not torch.equal(ours, plain):
            yield f"{where}: {_apart(ours, plain)}"
    elif isinstance(plain, dict) and isinstance(ours, dict):
        if ours.keys() != plain.keys():
            yield f"{where}: {sorted(map(str, ours))} for {sorted(map(str, plain))}"
        for key in plain:
            if key in ours:
                yield from _unequal(f"{where}[{key}]", ours[key], plain[key])
    elif isinstance(plain, list) and isinstance(ours, list):
        if len(ours) != len(plain):
            yield f"{where}: {len(ours)} items for {len(plain)}"
        for index, (one, other) in enumerate(zip(ours, plain, strict=False)):
            yield from _unequal(f"{where}[{index}]", one, other)
    elif type(ours) is not type(plain) or ours != plain:
        yield f"{where}: {_short(ours)} for {_short(plain)}"


def _apart(ours: Tensor, plain: Tensor) -> str:
    if ours.is_floating_point() and ours.isnan().any():
        return f"{int(ours.isnan().sum())} of {ours.numel()} are NaN"
    apart = (ours.double() - plain.double()).abs().max().item()
    return f"differs by up to {apart:.3g}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
