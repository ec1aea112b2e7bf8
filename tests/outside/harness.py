"""Run one use of parameters, gradients or states between training steps, in plain PyTorch and managed, and compare."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from parity import check_at_rest
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from outside.models import MODELS, Model

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Placement:
    """Where the model data of a managed run are."""

    name: str
    device: str = "cpu"
    """Where batches go."""
    is_tight: bool = False
    """Full copies have less room than the model has parameters."""
    is_on_disk: bool = False
    """Homes have less RAM than the model data need."""
    options: Mapping[str, Any] | None = None
    """Further arguments of `GeminiPlugin`."""

    def plugin(self, model: Model, folder: str) -> GeminiPlugin:
        options: dict[str, Any] = {"chunk_config_dict": {1: {"chunk_size": 256}}, **(self.options or {})}
        if self.is_tight:
            options["device_memory"] = model.tight_device_bytes
        if self.is_on_disk:
            options.update(host_memory=model.tight_host_bytes, offload_dir=folder)
        return GeminiPlugin(precision="fp32", telemetry=False, **options)


PLACEMENTS = {
    placement.name: placement
    for placement in (
        Placement("roomy", options={"host_memory": "64MiB"}),
        Placement("tight", is_tight=True, options={"host_memory": "16MiB"}),
        Placement("disk", is_on_disk=True),
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
            self.booster = Booster(plugin=placement.plugin(kind, folder))
            self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)
        self.losses: list[float] = []
        self.kept: list[Any] = []
        self._steps = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The innermost modules that have parameters."""
        return [module for module in self.model.modules() if any(True for _ in module.parameters(recurse=False))]

    def batch(self) -> Tensor:
        """The next batch; the same one in every run."""
        self._steps += 1
        return self.kind.batch(torch.Generator().manual_seed(self._steps)).to(self.device)

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


@dataclass(frozen=True)
class Refusal:
    """An error that a use must end with, before it has changed anything."""

    error: type[BaseException] | tuple[type[BaseException], ...]
    message: str
    """A pattern of the part that names the way out."""

    def fits(self, error: BaseException) -> bool:
        return isinstance(error, self.error) and re.search(self.message, str(error), re.IGNORECASE) is not None


@dataclass(frozen=True)
class Use:
    """What user code does between two training steps.

    It returns what it has seen, for comparison: tensors, numbers and strings in lists, tuples and dicts.
    """

    name: str
    run: Callable[[Training], Any]
    model: str = "layers"
    refusal: Refusal | None = None
    may_be_equal: bool = False
    """The use may work as well, if it is then right."""
    needs_host: bool = False
    """Plain PyTorch can do it with parameters in RAM only."""


class Catalogue:
    """The uses of one file, by name."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.uses: dict[str, Use] = {}

    def add(self, model: str = "layers", **options: Any) -> Callable[[Callable[[Training], Any]], Callable[..., Any]]:
        def register(function: Callable[[Training], Any]) -> Callable[[Training], Any]:
            name = f"{self.topic}: {function.__name__.replace('_', ' ').strip()}"
            assert name not in self.uses, f"two uses are called {name!r}"
            self.uses[name] = Use(name, function, model, **options)
            return function

        return register


@dataclass(frozen=True)
class Outcome:
    """All that a run left. Nothing in it shares memory with the run."""

    losses: list[float]
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
    if placement.is_tight:
        stats = run.model.memory_stats()
        assert stats["move/evict_count"] > 0, "nothing was evicted: this placement shows nothing"
    if placement.is_on_disk:
        assert run.model.memory_stats()["disk/used_bytes"] > 0, "nothing is on disk: this placement shows nothing"
    torch.manual_seed(11)
    refused = None
    returned = None
    try:
        returned = frozen(use.run(run))
    except Exception as error:
        if use.refusal is None or not use.refusal.fits(error):
            return Verdict("ERROR", _described(error))
        refused = _described(error)
    if refused is None and use.refusal is not None and not use.may_be_equal:
        return Verdict("WRONG", f"not refused; due: {use.refusal.message}")
    try:
        outcome = finish(run, returned)
        if run.booster is not None:
            check_at_rest(run.model)
    except Exception as error:
        return Verdict("ERROR", f"{'refused, then ' if refused else 'later '}{_described(error)}")
    expected = plain(None if refused else use, use.model)
    found = list(differences(outcome, expected))
    if found:
        return Verdict("WRONG", ("refused, but then " if refused else "") + "; ".join(found))
    return Verdict("refused", refused) if refused else Verdict("equal")


@lru_cache(maxsize=None)
def plain(use: Use | None, model: str) -> Outcome:
    """The outcome in plain PyTorch; without a use, of training alone."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = Training(MODELS[model], None, folder)
        run.train(2)
        torch.manual_seed(11)
        returned = frozen(use.run(run)) if use is not None else None
        return finish(run, returned)


def finish(run: Training, returned: Any) -> Outcome:
    """Train on for two steps and take down what is left."""
    torch.manual_seed(12)
    run.train(2)
    saved = run.optimizer.state_dict()
    return Outcome(
        losses=run.losses,
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
        found = list(_unequal(part, getattr(ours, part), getattr(plain, part)))
        if found:
            yield found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


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


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
