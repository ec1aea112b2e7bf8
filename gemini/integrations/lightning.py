"""Lightning: a strategy that trains under management, and a callback that logs memory statistics."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from gemini.boosted import boosted, is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.boosting.succession import give_optimizer
from gemini.chunk import find_accelerator
from gemini.config import GeminiConfig
from gemini.environment import number_of_ranks

from ..torch_private import own_modules
from .clipping import clip_by_norm
from .lightning_checkpoints import Checkpoints
from .precision import NONE, accelerators

PREFIX = "memory/"
_MIXED: Literal["bf16-mixed"] = "bf16-mixed"


class _Clipping:
    """The part of a precision that clips the gradients of a boosted optimizer wherever they are."""

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        if _is_managed(optimizer):
            clip_by_norm(optimizer, list(self.main_params(optimizer)), clip_val)  # type: ignore[attr-defined]
        else:
            super().clip_grad_by_norm(optimizer, clip_val)  # type: ignore[misc]

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        if _is_managed(optimizer):
            optimizer.clip_grad_by_value(clip_val)
        else:
            super().clip_grad_by_value(optimizer, clip_val)  # type: ignore[misc]


class ManagedAutocast(_Clipping, MixedPrecision):
    """Lightning's ``"bf16-mixed"`` over the fp32 parameters of a boosted module."""


class ManagedPrecision(_Clipping, Precision):
    """Lightning's fp32 precision; the boosted module computes in its own.

    Batches of a LightningModule that is boosted itself come in its dtype, as with Lightning's ``"bf16-true"``: only the
    call of a boosted module converts what goes in, and a step calls its parts.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root

    def convert_input(self, data: Any) -> Any:
        dtype = boosted(self._root).config.compute_dtype if is_boosted(self._root) else None
        if dtype is None or dtype is torch.float32:
            return data
        return apply_to_collection(
            data, function=lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, dtype=torch.Tensor
        )


_PRECISIONS = (Precision, MixedPrecision, ManagedPrecision, ManagedAutocast)


class GeminiStrategy(Checkpoints, SingleDeviceStrategy):
    """``Trainer(strategy=GeminiStrategy(...))``, or ``strategy="gemini"``.

    The module is boosted with the one optimizer of ``configure_optimizers`` when it is first fitted. A later ``fit``
    goes on with it, under an optimizer that keeps the same states. ``validate``, ``test`` and ``predict`` before that
    put it into chunks without room for training, which the first ``fit`` makes, in RAM or on disk; with
    ``update_in_backward`` they have it on the device in whole.

    ``Trainer(precision="bf16-mixed")`` means ``GeminiPlugin(precision="bf16")``: compute copies of fp32 masters. Beside
    ``precision="fp32"`` it is Lightning's own autocast, with the numbers of a plain trainer.

    Checkpoints are the files that Lightning writes, and ``load_from_checkpoint`` reads them. They are written one
    tensor at a time, appear when they are whole and on the disk, and are compared with their checksums when they are
    read. Hooks that look at the ``state_dict`` of a checkpoint get each tensor when they take it out.

    Parameters
    ----------
    plugin
        None: ``GeminiPlugin()``.
    module
        Name of the submodule that is managed; ``""`` is the LightningModule itself. None: the only submodule with
        parameters, where there is one that has all, else the LightningModule itself.
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
        self._refuse(trainer)
        assert self.lightning_module is not None
        self.precision_plugin = self._precision(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self._boost_for_evaluation()
        super().setup(trainer)

    def _precision(self, trainer: Trainer) -> Precision:
        asked = "bf16" if trainer.precision == _MIXED else NONE
        if accelerators(asked, self._config.precision) == NONE:
            return ManagedPrecision(self.lightning_module)
        return ManagedAutocast(_MIXED, self.root_device.type)

    @property
    def _config(self) -> GeminiConfig:
        """What the module is boosted with, or will be."""
        managed = self.managed_module
        return boosted(managed).config if is_boosted(managed) else self.plugin.config

    def _boost_for_evaluation(self) -> None:
        """Put a module into chunks that has not been fitted; ``fit`` makes room for gradients and states later."""
        managed, root = self.managed_module, self.lightning_module
        assert root is not None
        is_there = any(is_boosted(module) for module in root.modules())
        has_values = next(managed.parameters(), None) is not None
        if has_values and not is_there and not self.plugin.config.update_in_backward:
            Booster(plugin=self.plugin).boost(managed)

    def _refuse(self, trainer: Trainer) -> None:
        config = self.plugin.config
        if (ranks := dist.get_world_size() if dist.is_initialized() else number_of_ranks("WORLD_SIZE")) > 1:
            raise ValueError(
                f"GeminiStrategy trains in one process, and this is one of {ranks}: start one (python, not torchrun); "
                "on several train with a loop of your own and booster.boost, or with GeminiTrainerMixin"
            )
        if type(self.precision_plugin) not in _PRECISIONS or trainer.precision not in ("32-true", _MIXED):
            raise ValueError(
                f"leave the trainer's precision at its default, or give precision={_MIXED!r}; got "
                f"{type(self.precision_plugin).__name__} with {trainer.precision}: GeminiPlugin(precision=...) decides "
                "the compute dtype"
            )
        if config.precision == "fp16":
            raise ValueError("Lightning calls backward itself, without a loss scale: use precision='bf16' or 'fp32'")
        if trainer.gradient_clip_val and config.max_norm > 0:
            raise ValueError(
                f"gradients would be clipped twice, by gradient_clip_val={trainer.gradient_clip_val} and by "
                f"GeminiPlugin(max_norm={config.max_norm}): give one of them"
            )
        if trainer.gradient_clip_val and config.update_in_backward:
            raise ValueError("update_in_backward=True cannot clip: leave gradient_clip_val off, or boost without it")

    def model_to_device(self) -> None:
        """Move what is outside of chunks, which decide for the rest; everything as long as there are none."""
        root: nn.Module | None = self.model
        assert root is not None and self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            kept = [self.managed_module]
        else:
            kept = [module for module in root.modules() if is_boosted(module)]
        if any(module is root for module in kept):
            kept = list(root.children())  # the call itself tells Lightning the device
        with _taken_out(root, kept):
            root.to(self.root_device)

    def teardown(self) -> None:
        """As the base does, but nothing moves to the CPU."""
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        given: list[Any] = self.optimizers  # type: ignore[has-type]
        if len(given) != 1:
            raise ValueError(
                f"one optimizer can be managed, configure_optimizers gave {len(given)}; give one that has all "
                "parameters, in groups where their options differ"
            )
        managed, asked = self.managed_module, _unwrapped(given[0])
        if isinstance(asked, _MockOptimizer):  # configure_optimizers gave None: nothing is updated
            if not is_boosted(managed):
                managed.to(self.root_device)
            return
        if is_boosted(managed):
            give_optimizer(managed, asked)
        else:
            Booster(plugin=self.plugin).boost(managed, asked)
        self.optimizers = [asked]  # does what the managed one does, which the model keeps

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As the base does, but states stay where their chunks are."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    @property
    def managed_module(self) -> nn.Module:
        """What is, or will be, boosted."""
        root: nn.Module | None = self.lightning_module
        assert root is not None
        if self._module is not None:
            return root.get_submodule(self._module)
        children = [child for child in root.children() if any(True for _ in child.parameters())]
        has_own = next(root.parameters(recurse=False), None) is not None
        return children[0] if len(children) == 1 and not has_own else root


def _unwrapped(optimizer: Any) -> Any:
    """What a user may have wrapped already, in ``configure_optimizers``."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _is_managed(optimizer: Any) -> bool:
    return getattr(optimizer, "_managed", None) is not None


@contextmanager
def _taken_out(root: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without these submodules, wherever they are."""
    places = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in own_modules(parent).items()
        if any(child is module for module in modules)
    ]
    for parent, name, _ in places:
        own_modules(parent)[name] = None
    try:
        yield
    finally:
        for parent, name, child in places:
            own_modules(parent)[name] = child


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
