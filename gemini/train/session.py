"""What is trained: model, optimizer and schedule under management, how they are built, saved and read again."""

import base64
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MemoryMap, find_accelerator
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.train import checkpoints
from gemini.train.model import GPT2LMHeadModel
from gemini.train.options import Options, read_state
from gemini.train.ranks import Ranks

_STATE_BYTES = 12  # master, exp_avg and exp_avg_sq, fp32 each
_COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_ONE_FILE = "1000TB"  # from_pretrained finds it under one name, however large it is


@dataclass
class Session:
    """One model in training."""

    options: Options
    booster: Booster
    model: Any
    """The `GPT2LMHeadModel`; Any, because boosting adds methods to its class."""
    optimizer: HybridAdam
    schedule: LambdaLR
    step: int = 0
    """Steps taken, those of the run that was resumed included."""
    losses: list[float] = field(default_factory=list)
    """One a step, as ``step``: the mean over ranks."""
    ranks: Ranks = field(default_factory=Ranks.here)

    @property
    def device(self) -> torch.device:
        return boosted(self.model).capacities.device

    @property
    def run_folder(self) -> Path | None:
        """Where ``gemini-stat`` finds this run; None when nothing could be written."""
        telemetry = boosted(self.model).telemetry
        return telemetry.run_dir if telemetry is not None else None

    def stats(self) -> dict[str, int | float]:
        """After all that is under way is done."""
        boosted(self.model).manager.settle()
        stats: dict[str, int | float] = self.model.memory_stats()
        return stats

    def budget_sources(self) -> dict[str, str]:
        """Where each tier's number comes from, in the words of the command line."""
        budgets = boosted(self.model).capacities.budgets
        sources = {tier.value: budget.source for tier, budget in budgets.items()}
        for tier, source in sources.items():
            if getattr(self.options, f"{tier}_memory") is not None:
                sources[tier] = f"--{tier}-memory"
            elif source == f"argument {tier}_memory":
                sources[tier] = "half of the model data (the default)"
        if self.options.offload_dir is None:  # the name of a temporary folder tells nothing
            folder = boosted(self.model).config.offload_dir
            assert folder is not None
            sources["disk"] = sources["disk"].replace(str(folder), str(folder.parent))
        if boosted(self.model).capacities.memory is MemoryMap.UNIFIED:
            sources["device"] = "the same RAM as host"
        return sources

    def train_step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        """Forward, backward and an optimizer step on this rank's batch; the mean of the ranks' losses."""
        loss = self.model(tokens.to(self.device), targets.to(self.device))
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        value = self.ranks.mean(float(loss.detach()), self.device)
        self.step += 1
        self.losses.append(value)
        return value

    def save(self, folder: Path) -> None:
        """Add a checkpoint to a folder. All ranks do it together."""
        parts = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
        extra = checkpoints.state(self.step, self.losses, self.options.as_json())
        self.booster.save(folder, **parts, extra=extra, keep=self.options.keep, size_per_shard=_ONE_FILE)
        if self.ranks.is_first:
            checkpoints.show_newest(folder)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, or the newest one in a folder, exactly where it ended."""
        state = read_state(checkpoint)
        if checkpoints.is_old(checkpoint):
            self.booster.load_model(self.model, str(checkpoint))
            self.booster.load_optimizer(self.optimizer, str(checkpoint / checkpoints.OLD_OPTIMIZER))
            self.booster.load_lr_scheduler(self.schedule, str(checkpoint / checkpoints.OLD_SCHEDULE))
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch_rng"])), dtype=torch.uint8))
        else:
            parts = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
            state = self.booster.load(checkpoint, **parts)
        self.step, self.losses = int(state["step"]), [float(loss) for loss in state["losses"]]
        if self.options.lr != state["options"]["lr"]:
            self._change_rate(self.options.lr)

    def _change_rate(self, highest: float) -> None:
        """Have the schedule go on under another highest rate."""
        self.schedule.base_lrs[:] = [highest] * len(self.optimizer.param_groups)
        factor = self.schedule.lr_lambdas[0](self.schedule.last_epoch)
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["lr"] = highest, highest * factor


def model_data_bytes(options: Options) -> int:
    """Parameters, gradients and optimizer states of the model that the options describe."""
    return options.model.parameter_count() * bytes_per_parameter(options)


def bytes_per_parameter(options: Options) -> int:
    return _STATE_BYTES + _COMPUTE_BYTES[options.precision]


def build(options: Options, offload_dir: Path) -> Session:
    """Make the model lazily and boost it; values are made (or, resuming, read) straight into their homes.

    Raises
    ------
    OutOfMemory, OffloadError, CheckpointError
        As `Booster.boost` and `Booster.load_model`.
    """
    torch.manual_seed(options.seed)
    with LazyInitContext():
        model = GPT2LMHeadModel(options.model)
    optimizer = HybridAdam(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = LambdaLR(optimizer, _cosine(options.steps))
    device_memory, host_memory = _budget(options)
    plugin = GeminiPlugin(
        precision=options.precision,
        placement_policy=options.placement_policy,
        max_norm=1.0,
        device_memory=device_memory,
        host_memory=host_memory,
        disk_memory=options.disk_memory,
        offload_dir=offload_dir,
        gradient_reduction="mean",
    )
    booster = Booster(plugin=plugin)
    model, optimizer, _, _, schedule = booster.boost(model, optimizer, lr_scheduler=schedule)
    session = Session(options, booster, model, optimizer, schedule)
    if options.resume is not None:
        session.load(options.resume)
    return session


def _budget(options: Options) -> tuple[int | None, int | None]:
    """Device and host memory; where nothing is asked for, too little on purpose, because that is what to show."""
    if options.device_memory is not None or options.host_memory is not None:
        return options.device_memory, options.host_memory
    half = model_data_bytes(options) // 2
    return (None, half) if find_accelerator() is None else (half, None)


def _cosine(steps: int) -> Callable[[int], float]:
    """Linear warm-up over a tenth of the steps (100 at most), then a cosine down to a tenth of the rate."""
    warm_up = min(max(1, steps // 10), 100)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return factor


@contextmanager
def offload_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder of the disk tier; a temporary one is removed afterwards."""
    if chosen is not None:
        yield chosen
        return
    # /tmp is often RAM, which is what the disk tier is to save; /var/tmp is on disk by convention.
    asked = os.environ.get("TMPDIR")
    parent = asked or ("/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else None)
    with TemporaryDirectory(prefix="gemini-memory-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
