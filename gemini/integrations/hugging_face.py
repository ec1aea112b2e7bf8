"""``transformers.Trainer``: training under management, and memory statistics in its logs."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemini.boosted import boosted, is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.boosting.succession import give_optimizer, optimizer_of
from gemini.config import GeminiConfig

from .accelerator import managed, unwrapped
from .precision import accelerators, check_full_eval, default_precision
from .trainer_checkpoints import TrainerCheckpoints

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


class GeminiTrainerMixin(TrainerCheckpoints):
    """Makes a ``Trainer`` train its model under management::

        class MyTrainer(GeminiTrainerMixin, Trainer):
            pass

        MyTrainer(model=model, args=args, train_dataset=data, gemini_plugin=GeminiPlugin(host_memory="8GiB")).train()

    The optimizer is the one that the trainer is given or makes by its arguments (``optim="adamw_torch_fused"``,
    ``"sgd"``, ...), as `Booster.boost` takes it over. The model keeps its identity. A second trainer over it trains on,
    with an optimizer that keeps the same states. ``max_grad_norm`` clips, unless the plugin has a ``max_norm`` of its
    own. ``evaluate()`` and ``predict()`` put a model that has not been trained into chunks, with room for gradients and
    states only if the trainer has a ``train_dataset`` or an optimizer.

    ``bf16=True`` and ``fp16=True`` of the trainer mean ``GeminiPlugin(precision=...)`` of that name: compute copies of
    fp32 masters, with the plugin's loss scale for fp16. Beside ``GeminiPlugin(precision="fp32")``, ``bf16=True`` is the
    trainer's own autocast.

    Checkpoints have the trainer's own layout, and a plain trainer resumes from them. Their tensors are written one at a
    time; a folder ``checkpoint-N`` appears when all of it is on the disk, with a manifest of its files and their
    checksums, which is compared before training resumes. ``resume_from_checkpoint=True`` takes the newest whole one.

    Parameters
    ----------
    gemini_plugin
        None: ``GeminiPlugin(gradient_reduction="mean")``, with the precision that the trainer's arguments ask for. It
        counts when the model is boosted; a model that has been boosted keeps its own.

    Raises
    ------
    ValueError
        For arguments that management cannot keep: ``fp16`` or ``bf16`` beside another precision of the plugin,
        ``torch_compile`` of the whole model, DeepSpeed, FSDP, clipping beside ``update_in_backward``, the sum of
        several ranks' gradients instead of their mean.
    TypeError
        For an optimizer that cannot be managed, with the reason.
    """

    train_dataset: Any

    def __init__(self, *args: Any, gemini_plugin: GeminiPlugin | None = None, **kwargs: Any) -> None:
        self.gemini_plugin = gemini_plugin
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        _refuse(self.args)
        precision = self._precision()
        for name in ("bf16", "fp16"):
            if getattr(self.args, f"{name}_full_eval"):
                check_full_eval(name, precision)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator = managed(self.accelerator)  # type: ignore[has-type]

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        return {**made, "mixed_precision": accelerators(self.args.mixed_precision, self._precision())}

    def _precision(self) -> str:
        """That of the model's chunks, which it may not have yet."""
        model: nn.Module | None = self.model
        config = boosted(model).config if model is not None and is_boosted(model) else self._plugin().config
        return config.precision

    def _plugin(self) -> GeminiPlugin:
        if self.gemini_plugin is not None:
            return self.gemini_plugin
        return GeminiPlugin(gradient_reduction="mean", precision=default_precision(self.args.mixed_precision))

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        """Chunks decide where parameters are."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not is_boosted(self.model):
            self._boost_for_evaluation()
        arguments = self.args
        if arguments.bf16_full_eval or arguments.fp16_full_eval:
            self.args = _NothingConverted(arguments)
        try:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args = arguments

    def _boost_for_evaluation(self) -> None:
        """Put a model into chunks that has not been trained; with room for training, if it is to be trained later.

        Room that is made later cannot be on an accelerator, and chunks have their size by then.
        """
        if self.train_dataset is None and self.optimizer is None:
            Booster(plugin=self._plugin()).boost(self.model)
            return
        is_given = self.optimizer is not None
        self.create_optimizer()
        if not is_given:
            self.optimizer = None  # `train` makes one of the arguments of then, which takes the place of this one

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        model: nn.Module = self.model
        given = unwrapped(self.optimizer)
        if is_boosted(model) and (current := optimizer_of(model, given)) is not None:
            if current is not given:
                self.optimizer = current
            return self.optimizer  # type: ignore[no-any-return]
        plugin = self._plugin()
        _check(boosted(model).config if is_boosted(model) else plugin.config, self.args)
        is_sum = (
            boosted(model).manager.together.communicator.gradient_factor == 1.0
            if is_boosted(model)
            else (plugin.gradient_reduction == "sum")
        )
        _check_reduction(is_sum, self.args.world_size)
        made: Any = unwrapped(super().create_optimizer(*args, **kwargs))  # type: ignore[misc]
        if is_boosted(model):
            self.optimizer = give_optimizer(model, made)
        else:
            _, self.optimizer, *_ = Booster(plugin=plugin).boost(model, made)
        return self.optimizer  # type: ignore[no-any-return]


class _NothingConverted:
    """A trainer's arguments without ``full_eval``: a model in chunks computes in that precision already."""

    bf16_full_eval = fp16_full_eval = False

    def __init__(self, arguments: TrainingArguments) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


_REFUSED = {
    "torch_compile": "leave {0} off: torch.compile the model or its blocks before the trainer gets it",
    "deepspeed": "leave {0} off: it manages the same memory; without it chunks offload to RAM and disk",
    "fsdp": "leave {0} off: it manages the same memory; without it chunks offload to RAM and disk",
}
"""Arguments of a trainer, and what to do instead."""


def _refuse(arguments: TrainingArguments) -> None:
    faults = [text.format(name) for name, text in _REFUSED.items() if getattr(arguments, name, None)]
    if faults:
        raise ValueError("; ".join(faults))


def _check(config: GeminiConfig, arguments: TrainingArguments) -> None:
    """Raise if a model in this configuration cannot be trained with a trainer's arguments."""
    if config.update_in_backward:
        if arguments.max_grad_norm:
            raise ValueError(
                f"update_in_backward=True cannot clip, and the trainer's max_grad_norm is {arguments.max_grad_norm:g} "
                "(its default is 1): give TrainingArguments(max_grad_norm=0.0)"
            )
        if arguments.gradient_accumulation_steps > 1:
            raise ValueError(
                "update_in_backward=True uses gradients up within each backward, and the trainer is to accumulate them "
                f"over {arguments.gradient_accumulation_steps}: leave gradient_accumulation_steps at 1, or boost "
                "without it"
            )


def _check_reduction(is_sum: bool, world_size: int) -> None:
    """Raise if the ranks' gradients are summed: a trainer multiplies each loss so that their mean comes out right."""
    if is_sum and world_size > 1:
        raise ValueError(
            "a Trainer on several ranks counts on the mean of their gradients, and the default of GeminiPlugin is "
            'their sum: give gemini_plugin=GeminiPlugin(gradient_reduction="mean")'
        )
