"""The bar of the tests with several ranks: W ranks train as one process does that accumulates their micro-batches.

The micro-batches of a step are numbered. Rank r of W takes r, W + r, 2 W + r and so on; one process takes all of them
in order. Losses, weights and optimizer states are then equal, bit for bit.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
import torch.distributed as dist
from parity import check_at_rest, masters
from torch import Tensor, nn
from world import World

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam


class Where(Enum):
    """Who trains."""

    RANKS = auto()
    """All ranks together, each with its micro-batches."""
    ALONE = auto()
    """This process with all micro-batches, under management."""
    PLAIN = auto()
    """The same without management: plain PyTorch."""


@dataclass
class Ended:
    """What training has left."""

    losses: dict[int, float] = field(default_factory=dict)
    """By the number of the micro-batch."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    """What else a test has noted; the same with all ranks."""
    stats: dict[str, int | float] = field(default_factory=dict)
    """``model.memory_stats()``, of managed training; not compared."""


class Training:
    """A training program. Tests override what they are about.

    Parameters
    ----------
    where
        Who trains.
    lazy, steps, micro_batches
        In place of those of the class.
    plugin
        Options of `GeminiPlugin`.
    """

    steps = 3
    micro_batches = 4
    """Of each step, of all ranks together."""
    lazy = False
    precision = "fp32"
    width = 32

    def __init__(
        self,
        where: Where,
        lazy: bool | None = None,
        steps: int | None = None,
        micro_batches: int | None = None,
        **plugin: Any,
    ) -> None:
        self.where = where
        self.lazy = self.lazy if lazy is None else lazy
        self.steps = self.steps if steps is None else steps
        self.micro_batches = self.micro_batches if micro_batches is None else micro_batches
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if where is Where.RANKS else (0, 1)
        self.ended = Ended()
        model: Any = self.built()
        self.optimizer: Any = self.make_optimizer(model)
        self.model: Any = model
        self.max_norm = plugin.get("max_norm", 0.0)
        if where is not Where.PLAIN:
            self.booster = Booster(plugin=self.make_plugin(**plugin))
            self.model, self.optimizer, *_ = self.booster.boost(model, self.optimizer)

    @property
    def is_managed(self) -> bool:
        return self.where is not Where.PLAIN

    # -- what tests override

    def build(self) -> nn.Module:
        layers = [m for _ in range(3) for m in (nn.Linear(self.width, self.width), nn.GELU(), nn.Dropout(0.1))]
        return nn.Sequential(*layers, nn.LayerNorm(self.width), nn.Linear(self.width, 8))

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)

    def make_plugin(self, **plugin: Any) -> GeminiPlugin:
        if self.where is Where.ALONE:
            plugin["process_group"] = alone()
        return GeminiPlugin(precision=self.precision, telemetry=False, **plugin)

    def batch(self, number: int) -> Any:
        """The micro-batch of this number, counted from the start."""
        return torch.randn(2, self.width, generator=torch.Generator().manual_seed(number))

    def loss(self, number: int) -> Tensor:
        return self.model(self.batch(number)).float().square().mean()  # type: ignore[no-any-return]

    def begin_step(self, step: int) -> None:
        """Before the first forward of a step."""

    def before_update(self, step: int) -> None:
        """Between the last backward and ``step()``."""

    def end_step(self, step: int) -> None:
        """After ``zero_grad``."""

    # -- the loop

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        if self.lazy and self.is_managed:
            with LazyInitContext():
                return self.build()
        return self.build()

    def own(self, step: int) -> range:
        """Our micro-batches of a step."""
        return range(step * self.micro_batches + self.rank, (step + 1) * self.micro_batches, self.size)

    def backward(self, loss: Tensor) -> None:
        if self.is_managed:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()

    def micro_step(self, number: int) -> None:
        torch.manual_seed(number)  # random draws in forward
        loss = self.loss(number)
        self.backward(loss)
        self.ended.losses[number] = loss.item()

    def accumulate(self, step: int) -> None:
        for number in self.own(step):
            self.micro_step(number)

    def update(self) -> None:
        if self.max_norm and not self.is_managed:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> Ended:
        self.model.train()
        for step in range(self.steps):
            self.begin_step(step)
            self.accumulate(step)
            self.before_update(step)
            self.update()
            self.end_step(step)
        return self.end()

    def end(self) -> Ended:
        """Note what there is now."""
        ended = self.ended
        named = dict(self.model.named_parameters())
        numbers = {id(p): i for i, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])}
        states = self.optimizer.state_dict()["state"]
        ended.states = {n: states[numbers[id(p)]] for n, p in named.items() if numbers.get(id(p)) in states}
        ended.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if self.is_managed:
            ended.stats = self.model.memory_stats()
            check_at_rest(self.model)
            ended.weights = masters(self.model)
        else:
            ended.weights = {name: p.detach().clone() for name, p in named.items()}
        return ended


def alone() -> dist.ProcessGroup:
    """A group of this process only."""
    group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def both(kind: type[Training], reference: Where, options: dict[str, Any]) -> tuple[Ended, Ended | None]:
    """Train with all ranks; on the first one also alone."""
    ours = kind(Where.RANKS, **options).train()
    return ours, kind(reference, **options).train() if dist.get_rank() == 0 else None


def check_exact(world: World, kind: type[Training], reference: Where = Where.PLAIN, **options: Any) -> list[Ended]:
    """All ranks together end as one process does. Returns what each rank has."""
    results = world.run(both, kind, reference, options)
    expected = results[0][1]
    ranks = [ours for ours, _ in results]
    losses = {number: loss for ended in ranks for number, loss in ended.losses.items()}
    assert losses == expected.losses
    for ended in ranks:
        assert_same(ended.weights, expected.weights)
        assert_same(flat(ended.states), flat(expected.states))
        assert_same(ended.buffers, expected.buffers)
        assert ended.seen == expected.seen
    return ranks


def flat(states: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {f"{name} {key}": torch.as_tensor(value) for name, state in states.items() for key, value in state.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


SMALL = {"chunk_config_dict": {1: {"chunk_size": 1024}}}
TIERS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "16KiB", **SMALL},
    "disk": {"host_memory": "60KiB", "offload_dir": "/tmp", **SMALL},
}
"""Where the models of `Training` are, with one process and with several."""
