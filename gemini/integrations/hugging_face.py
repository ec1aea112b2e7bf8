"""``transformers.Trainer``: training under management, and memory statistics in its logs."""

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemini.boosted import is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

PREFIX = "memory/"


class GeminiTrainerCallback(TrainerCallback):
    """Adds ``model.memory_stats()`` to every log of a trainer whose model is boosted.

    Callbacks see a log one after the other, those that write it to wandb or TensorBoard among them: `first_of` puts
    this one before them.

    Parameters
    ----------
    keys
        The statistics to add; None: all.
    """

    def __init__(self, keys: tuple[str, ...] | None = None) -> None:
        self.keys = keys

    @classmethod
    def first_of(cls, trainer: Trainer, keys: tuple[str, ...] | None = None) -> "GeminiTrainerCallback":
        """Add the callback to a trainer, ahead of the ones it has."""
        callback = cls(keys)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or model is None or not is_boosted(model):
            return
        stats: dict[str, int | float] = model.memory_stats()  # type: ignore[operator]
        chosen = {f"{PREFIX}{key}": value for key, value in stats.items() if self.keys is None or key in self.keys}
        logs.update(chosen)
        if state.log_history:
            state.log_history[-1].update(chosen)


class GeminiTrainerMixin:
    """Makes a ``Trainer`` train its model under management::

        class MyTrainer(GeminiTrainerMixin, Trainer):
            pass

        MyTrainer(model=model, args=args, train_dataset=data, gemini_plugin=GeminiPlugin(host_memory="8GiB")).train()

    The optimizer is the one that the trainer is given or makes by its arguments (``optim="adamw_torch_fused"``,
    ``"sgd"``, ...), as `Booster.boost` takes it over; clipping goes to the plugin. The model keeps its identity, so a
    trainer's own saving works.

    Parameters
    ----------
    gemini_plugin
        None: ``GeminiPlugin()``. Its ``max_norm`` is set from ``max_grad_norm`` if it is 0.

    Raises
    ------
    ValueError
        For arguments that management cannot keep: fp16 of the trainer, ``torch_compile`` of the whole model.
    TypeError
        For an optimizer that cannot be managed, with the reason.
    """

    optimizer: Any  # the trainer's

    def __init__(self, *args: Any, gemini_plugin: GeminiPlugin | None = None, **kwargs: Any) -> None:
        self.gemini_plugin = gemini_plugin
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        arguments: TrainingArguments = self.args  # type: ignore[attr-defined]
        if arguments.fp16 or arguments.bf16 or arguments.torch_compile:
            raise ValueError(
                "leave fp16, bf16 and torch_compile off: GeminiPlugin(precision=...) decides the compute dtype, "
                "and blocks are compiled one by one"
            )
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.device_placement = False  # type: ignore[attr-defined]

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        """Chunks decide where parameters are."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        model: nn.Module = self.model  # type: ignore[attr-defined]
        if is_boosted(model):
            return self.optimizer  # type: ignore[no-any-return]
        arguments: TrainingArguments = self.args  # type: ignore[attr-defined]
        plugin = _clipping(self.gemini_plugin or GeminiPlugin(), arguments.max_grad_norm or 0.0)
        if plugin.config.precision == "fp16":
            raise ValueError("a Trainer calls backward itself, without a loss scale: use precision='bf16' or 'fp32'")
        arguments.max_grad_norm = 0.0  # gradients are in the chunks, where the trainer finds none to clip
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        _, self.optimizer, *_ = Booster(plugin=plugin).boost(model, made)
        return self.optimizer  # type: ignore[no-any-return]


def _clipping(plugin: GeminiPlugin, max_norm: float) -> GeminiPlugin:
    """The plugin, with this ``max_norm`` if it has none of its own."""
    if max_norm == 0 or plugin.config.max_norm > 0:
        return plugin
    if plugin.config.update_in_backward:
        raise ValueError(
            f"update_in_backward=True cannot clip, and the trainer's max_grad_norm is {max_norm:g} (its default is 1): "
            "give TrainingArguments(max_grad_norm=0.0)"
        )
    clipping = copy.copy(plugin)
    clipping.config = replace(plugin.config, max_norm=max_norm)
    return clipping
