"""The bar of most tests: a managed run equals an unmanaged one, bit for bit."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, ChunkState, Tier
from gemini.chunk.disk import PAGE_BYTES
from gemini.errors import OutOfMemory
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.signals import uninterrupted

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Run:
    """What a training run left: everything that must be equal."""

    losses: list[float]
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and how to train it."""

    build: Build
    batches: Sequence[Any]
    loss: Loss
    precision: str = "fp32"
    lr: float = 1e-2
    weight_decay: float = 0.1
    states: str = "fp32"
    """How `HybridAdam` keeps the moments."""
    prepare: Callable[[nn.Module], None] = lambda model: None
    """Applied to the model before training starts (activation checkpointing)."""

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


def hybrid(parameters: Any, task: Task) -> HybridAdam:
    return HybridAdam(parameters, lr=task.lr, weight_decay=task.weight_decay, states=task.states)


def torch_fused(parameters: Any, task: Task) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=task.lr, weight_decay=task.weight_decay, fused=True)


def run_plain(task: Task, optimizer: Callable[[Any, Task], torch.optim.Optimizer] = hybrid) -> Run:
    """Train without management; bf16 parameters have masters that start from their rounded values."""
    model = _seeded(task, lazy=False)
    if task.precision != "fp32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(task.dtype)
    opt = optimizer(model.parameters(), task)
    losses = []
    torch.manual_seed(5)
    for batch in task.batches:
        loss = task.loss(model, batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    state = {name: opt.state.get(p, {}) for name, p in model.named_parameters()}
    names, saved = list(state), opt.state_dict()["state"]  # numbered in the order of the parameters
    return Run(
        losses,
        {name: state[name].get("master", p).detach().clone() for name, p in model.named_parameters()},
        *({names[i]: s[key] for i, s in saved.items() if key in s} for key in ("exp_avg", "exp_avg_sq")),
        {name: b.clone() for name, b in model.named_buffers()},
    )


def run_managed(task: Task, lazy: bool = False, **plugin: Any) -> tuple[Run, nn.Module]:
    """Train under management; the model comes back for a look at its statistics."""
    model = _seeded(task, lazy)
    booster = Booster(plugin=GeminiPlugin(precision=task.precision, telemetry=False, **plugin))
    model, opt, *_ = booster.boost(model, hybrid(model.parameters(), task))
    losses = []
    torch.manual_seed(5)
    for batch in task.batches:
        loss = task.loss(model, batch)
        booster.backward(loss, opt)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    check_at_rest(model)
    states = opt.state_dict()["state"]  # numbered in the order of the parameters
    names = [name for name, _ in model.named_parameters()]
    moments = [{names[i]: state[key] for i, state in states.items()} for key in ("exp_avg", "exp_avg_sq")]
    return Run(losses, masters(model), *moments, {name: b.clone() for name, b in model.named_buffers()}), model


def masters(model: nn.Module) -> dict[str, Tensor]:
    """The truth of each parameter; of those outside of the chunks their values."""
    manager = boosted(model).manager
    return {
        name: p.detach().clone() if manager.find(p) is None else manager.read(p, MASTER)
        for name, p in model.named_parameters()
    }


def check_at_rest(model: nn.Module) -> None:
    """No pin is left, no call is under way, and the ledger says what the chunks say."""
    manager = boosted(model).manager
    assert boosted(model).hooks._depth == 0
    assert uninterrupted._watches == uninterrupted._sections == 0
    manager.settle()
    boosted(model).saving.rest(10.0)
    boosted(model).step._updater._queue._thread.submit(int).result(10.0)  # behind updates that were called off
    assert [c.pins for c in manager.chunks] == [0] * len(manager.chunks)
    assert not [c for c in manager.chunks if c.state is ChunkState.IN_USE]
    homes = [home for c in manager.chunks for home in c.homes.values()]
    gradients = [c.gradient for c in manager.chunks if c.gradient is not None]
    homes += [g.buffer for g in gradients if g.buffer is not None and not g.is_borrowed]
    parts = [part for home in homes for part in home.parts]
    full = sum(c.full_nbytes for c in manager.chunks if c.is_resident or c in manager.full_copies.taken)
    on_device = (
        full
        + manager.gradient_pool.nbytes_on(Tier.DEVICE)
        + sum(part.nbytes for part in parts if part.tier is Tier.DEVICE)
    )
    assert manager.ledger._used[Tier.DEVICE] == on_device
    on_disk = sum(-(-part.nbytes // PAGE_BYTES) * PAGE_BYTES for part in parts if part.tier is Tier.DISK)
    assert manager.ledger.used(Tier.DISK) == on_disk + boosted(model).saving.counts.disk_bytes
    given_up = boosted(model).engine.room.given_up_bytes  # after an out of memory; the peak is from before
    found = boosted(model).capacities
    for tier in Tier:
        beyond = given_up + manager.ledger.peak_overdraft(tier)
        # The model's own computation has had its part since, or has given some of it back for a while.
        limit = (found.device_limit_bytes or 0) if tier is Tier.DEVICE else 0
        most = max(manager.ledger.capacity(tier), found.nbytes[tier], limit)
        assert manager.ledger.peak(tier) <= most + beyond, tier


def check_equal(run: Run, expected: Run) -> None:
    """Bit for bit: losses, weights, both moments, buffers."""
    assert run.losses == expected.losses
    for ours, theirs in zip(
        (run.weights, run.exp_avg, run.exp_avg_sq, run.buffers),
        (expected.weights, expected.exp_avg, expected.exp_avg_sq, expected.buffers),
        strict=True,
    ):
        assert set(ours) >= set(theirs)
        different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not different


def check_parity(task: Task, lazy: bool = False, **plugin: Any) -> nn.Module:
    """A managed run with these plugin arguments equals the plain one."""
    run, model = run_managed(task, lazy, **plugin)
    check_equal(run, run_plain(task))
    return model


def tightest(task: Task, tier: str, **plugin: Any) -> int:
    """The smallest capacity that works, found by doing what the error messages say."""
    capacity = 1
    for _ in range(20):
        try:
            run_managed(task, **{**plugin, f"{tier}_memory": capacity})
        except OutOfMemory as error:
            named = re.search(rf"set {tier}_memory to (\d+) bytes", str(error))
            assert named is not None, f"the message names no remedy: {error}"
            assert int(named[1]) > capacity
            capacity = int(named[1])
        else:
            return capacity
    raise AssertionError(f"the messages did not lead to a capacity that works; the last was {capacity}")


def _seeded(task: Task, lazy: bool) -> nn.Module:
    torch.manual_seed(0)
    if lazy:
        with LazyInitContext():
            model = task.build()
    else:
        model = task.build()
        if task.precision != "fp32":  # then masters start equal: ours from fp32 values, the plain ones from rounded
            for parameter in model.parameters():
                parameter.data = parameter.data.to(task.dtype).to(parameter.dtype)
    task.prepare(model)
    model.train()
    return model
