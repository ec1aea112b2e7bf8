"""Lightning: a strategy that trains under management, and a callback that logs memory statistics."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import nn

from gemini.boosted import is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import find_accelerator

PREFIX = "memory/"


class GeminiStrategy(SingleDeviceStrategy):
    """``Trainer(strategy=GeminiStrategy(...))``, or ``strategy="gemini"``.

    Parameters
    ----------
    plugin
        None: ``GeminiPlugin()``.
    module
        Name of the submodule that is managed, whose ``forward`` holds all uses of its parameters. None: the only
        submodule with parameters, where there is one.
    device
        What computes; None: the current CUDA device, else the CPU.
    kwargs
        As of ``SingleDeviceStrategy``.

    Raises
    ------
    ValueError
        At the start of ``fit``, for a trainer's options that management cannot keep; the message names ours.
    """

    strategy_name = "gemini"

    def __init__(
        self,
        plugin: GeminiPlugin | None = None,
        module: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(device or find_accelerator() or "cpu", **kwargs)
        self.plugin = plugin or GeminiPlugin()
        self._module = module

    def setup(self, trainer: Trainer) -> None:
        if trainer.gradient_clip_val:
            raise ValueError(
                "gradient_clip_val finds no gradients to clip, they are in chunks: use GeminiPlugin(max_norm=...)"
            )
        if trainer.precision != "32-true":
            raise ValueError(
                f"leave the trainer's precision at its default, got {trainer.precision}: GeminiPlugin(precision=...) "
                "decides the compute dtype"
            )
        if self.plugin.config.precision == "fp16":
            raise ValueError("Lightning calls backward itself, without a loss scale: use precision='bf16' or 'fp32'")
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Chunks decide where parameters are; only what stays outside of them moves."""
        assert self.model is not None
        managed = self.managed_module
        for child in self.model.children():
            if child is not managed:
                child.to(self.root_device)

    def teardown(self) -> None:
        """As the base does, but nothing moves to the CPU."""
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        managed = self.managed_module
        if is_boosted(managed):
            return
        given: list[Any] = self.optimizers  # type: ignore[has-type]
        if len(given) != 1:
            raise ValueError(f"one optimizer can be managed, configure_optimizers gave {len(given)}")
        _, optimizer, *_ = Booster(plugin=self.plugin).boost(managed, given[0])
        self.optimizers = [optimizer]
        for config in self.lr_scheduler_configs:
            config.scheduler.optimizer = optimizer

    @property
    def managed_module(self) -> nn.Module:
        """What is, or will be, boosted."""
        root: nn.Module | None = self.lightning_module
        assert root is not None
        if self._module is not None:
            return root.get_submodule(self._module)
        children = [child for child in root.children() if any(True for _ in child.parameters())]
        if len(children) != 1 or next(root.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"which part of {type(root).__name__} is to be managed? It has {len(children)} submodules with "
                "parameters; give GeminiStrategy(module='name')"
            )
        return children[0]


class GeminiStatsMonitor(Callback):
    """Logs ``memory_stats()`` of the managed module to the trainer's loggers.

    Parameters
    ----------
    every_n_steps
        Optimizer steps between two logs.
    keys
        The statistics to log; None: all.
    """

    def __init__(self, every_n_steps: int = 50, keys: tuple[str, ...] | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.keys = keys

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        for module in pl_module.modules():
            if is_boosted(module):
                stats: dict[str, int | float] = module.memory_stats()
                chosen = {f"{PREFIX}{k}": v for k, v in stats.items() if self.keys is None or k in self.keys}
                for logger in trainer.loggers:
                    logger.log_metrics(chosen, step=trainer.global_step)
                return


if "gemini" not in StrategyRegistry:
    StrategyRegistry.register("gemini", GeminiStrategy, description="chunks on device, host and disk")
