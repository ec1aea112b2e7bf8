"""`Booster`: wraps the objects of a training loop with what its plugin does."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gemini.arguments.brief import brief
from gemini.arguments.checked import checked
from gemini.lease.budget import said_sizes
from gemini.quantization import Quantization

from .arguments import BACKWARD, BOOSTER, ENABLE_LORA, NO_SYNC, RELEASE, RESIZE, RESUME
from .checkpointing import Checkpointing
from .lora import add_adapters
from .plugin import GeminiPlugin

KINDS = ("model", "optimizer", "criterion", "dataloader", "lr_scheduler")


class Booster(Checkpointing):
    """Applies a plugin to a training loop, with ColossalAI's interface.

    Parameters
    ----------
    device
        Accepted for ColossalAI's sake; the plugin decides where things run.
    mixed_precision
        Only without a plugin: the precision of the default one.
    plugin
        None: ``GeminiPlugin()``.
    """

    @checked(BOOSTER)
    def __init__(
        self,
        device: str | torch.device | None = None,
        mixed_precision: str | None = None,
        plugin: GeminiPlugin | None = None,
    ) -> None:
        if plugin is not None and not isinstance(plugin, GeminiPlugin):
            raise TypeError(
                f"plugin must be a GeminiPlugin or None, got {brief(plugin)} of type {type(plugin).__name__}"
            )
        if plugin is not None and mixed_precision is not None:
            raise ValueError(
                "the plugin controls the precision: give GeminiPlugin(precision=...) instead of mixed_precision"
            )
        self.plugin = plugin or (GeminiPlugin() if mixed_precision is None else GeminiPlugin(precision=mixed_precision))

    def boost(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Any = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple[Any, ...]:
        """Put the model under management and bind the optimizer to it.

        Given in this order, the five come back in this order (None where nothing was given). Given in another order,
        exactly the objects given come back in the order given.

        Parameters
        ----------
        model
            Plain or built inside ``LazyInitContext``. Changed in place.
        optimizer
            `HybridAdam`, ``torch.optim.Adam`` or ``AdamW`` over the model's parameters; the latter two come back as
            a `HybridAdam` with the same groups. Or another one of torch's (but for SparseAdam and LBFGS), Lion, NAdamW,
            Adan or Adafactor of a well-known package, or one given to `gemini.nn.optimizer.register_elementwise` or
            `register_whole_parameter`; it comes back as an optimizer with the same groups, the same
            arithmetic and the same ``state_dict()``. A list of several, each with parameters of its own (Muon for
            matrices, AdamW for the rest), comes back as one that is a sequence of them. None: inference only.
        criterion, dataloader, lr_scheduler
            Come back as they are; the scheduler steers the optimizer that comes back.

        Raises
        ------
        TypeError
            If an object is of no known kind, or two are of the same.
        OutOfMemory, OffloadError, ValueError
            See `GeminiPlugin`; nothing has been changed then.
        """
        given = [model, optimizer, criterion, dataloader, lr_scheduler]
        while given and given[-1] is None:
            given.pop()
        kinds = _kinds(given)
        by_kind = {kind: value for kind, value in zip(kinds, given, strict=True) if kind is not None}
        if "model" not in by_kind:
            raise TypeError(
                "boost needs a model (torch.nn.Module), got "
                + (", ".join(type(g).__name__ for g in given) or "nothing")
            )
        configured = self.plugin.configure(by_kind["model"], *(by_kind.get(kind) for kind in KINDS[1:]))
        result = dict(zip(KINDS, configured, strict=True))
        in_order = all(kind is None or kind == place for kind, place in zip(kinds, KINDS, strict=False))
        if in_order:
            return tuple(result[kind] for kind in KINDS)
        return tuple(result[kind] if kind is not None else None for kind in kinds)

    @checked(BACKWARD)
    def backward(self, loss: Tensor, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Run backward; with fp16, on the scaled loss.

        After an exception nothing stays pinned and the gradients of this backward are dropped.
        """
        self.plugin.backward(loss, optimizer)

    @checked(NO_SYNC)
    def no_sync(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None
    ) -> AbstractContextManager[None]:
        """Gradients add up over several backwards (with or without this context); no exchange between ranks inside."""
        return self.plugin.no_sync(model, optimizer)

    @checked(ENABLE_LORA)
    def enable_lora(
        self,
        model: nn.Module,
        pretrained_dir: Any = None,
        lora_config: Any = None,
        bnb_quantization_config: Any = None,
        quantize: "bool | str | Quantization | None" = None,
    ) -> nn.Module:
        """Wrap a model (before `boost`) with adapters of ``peft``; frozen weights then have no gradients and states.

        ``enable_lora(model, lora_config, "nf4")``, or in ColossalAI's order ``enable_lora(model, pretrained_dir,
        lora_config)``: arguments are recognised by their types. The model may be lazy.

        Parameters
        ----------
        pretrained_dir
            Folder with saved adapters, which train on; their checksums are verified, where they have some.
        lora_config
            ``peft.LoraConfig``, or the configuration of another method of peft, for new adapters.
        bnb_quantization_config
            A ``BitsAndBytesConfig`` of transformers, taken for the format and the modules that it names. The package
            bitsandbytes is not used.
        quantize
            Have `boost` keep the frozen linear layers in ``"nf4"`` (also ``True``) or ``"int8"``, or as a
            `gemini.Quantization` says.

        Raises
        ------
        ImportError
            Without ``peft``.
        TypeError, ValueError
            If the arguments name no adapters, the model is boosted, or the frozen layers are to be kept in a form that
            is not known.
        CheckpointError
            If the saved adapters are damaged.
        """
        given = {
            "pretrained_dir": pretrained_dir,
            "lora_config": lora_config,
            "bnb_quantization_config": bnb_quantization_config,
            "quantize": quantize,
        }
        return add_adapters(model, given)

    @checked(RESIZE)
    def resize(
        self,
        model: nn.Module,
        *,
        host_memory: int | str | None = None,
        device_memory: int | str | None = None,
        disk_memory: int | str | None = None,
    ) -> None:
        """Have a boosted model take other budgets from now on, between two steps; its homes move down or up.

        Numbers stay what they are. What is said here is not taken away by other models and runs. All ranks do this
        together, with the same sizes.

        Parameters
        ----------
        model
            As `boost` returned it.
        host_memory, device_memory, disk_memory
            Bytes of model data per tier, as a number or ``"8GiB"``; None leaves one as it is.

        Raises
        ------
        OutOfMemory, OffloadError
            If the model cannot do with that; nothing has been changed. The message says what would be enough.
        ValueError, TypeError
            If nothing is given, a size is none, the model has no such tier, or its budget has less.
        RuntimeError
            While a forward or backward runs, or the model is released.
        """
        from gemini.boosted import boosted

        given = said_sizes({"host": host_memory, "device": device_memory, "disk": disk_memory})
        if not given:
            raise ValueError("booster.resize needs host_memory, device_memory or disk_memory, such as '8GiB'; got none")
        boosted(model).tenancy.set(given)

    @checked(RELEASE)
    def release(self, model: nn.Module, folder: str | Path | None = None) -> None:
        """Give the memory of a model and its optimizer back until `resume`; see `gemini.boosting.release.release`."""
        from gemini.boosting.release import release

        release(model, folder)

    @checked(RESUME)
    def resume(self, model: nn.Module) -> None:
        """Take memory for a released model again; see `gemini.boosting.release.resume`."""
        from gemini.boosting.release import resume

        resume(model)

    def execute_pipeline(self, *args: Any, **kwargs: Any) -> NoReturn:
        """ColossalAI's, for pipelines. Raises NotImplementedError."""
        raise NotImplementedError(
            "there are no pipelines: call the model and booster.backward(loss, optimizer), which is what scripts of "
            "ColossalAI do with GeminiPlugin"
        )


def _kinds(given: list[Any]) -> list[str | None]:
    """What each object is; a module after the first is a criterion."""
    kinds: list[str | None] = []
    for value in given:
        kind = None if value is None else _kind(value, has_model="model" in kinds)
        if kind is not None and kind in kinds:
            more = ": give several as a list, boost(model, [a, b])" if kind == "optimizer" else ""
            raise TypeError(f"boost got two objects of the kind {kind}; the second is a {type(value).__name__}{more}")
        kinds.append(kind)
    return kinds


def _kind(value: Any, has_model: bool) -> str:
    if isinstance(value, list | tuple) and not value:
        raise TypeError(
            f"boost got an empty {type(value).__name__}, which may stand for optimizers or for data: leave it out, or "
            "give what belongs in it"
        )
    if isinstance(value, list | tuple) and all(isinstance(each, Optimizer) for each in value):
        return "optimizer"
    several = _several(value)
    if several is not None:
        raise TypeError(f"boost got a {type(value).__name__} of {several}")
    if isinstance(value, Optimizer):
        return "optimizer"
    if isinstance(value, LRScheduler) or (hasattr(value, "get_last_lr") and hasattr(value, "step")):
        return "lr_scheduler"
    if isinstance(value, nn.Module):
        return "criterion" if has_model else "model"
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Tensor):
        return "dataloader"
    if callable(value) and not isinstance(value, type):
        return "criterion"
    raise TypeError(
        f"boost got {value!r} of type {type(value).__name__}; expected a model (torch.nn.Module), an optimizer, "
        "a criterion (callable), a dataloader (iterable) or a learning rate scheduler"
    )


_ONE_OF_EACH: tuple[tuple[type, str], ...] = (
    (
        Optimizer,
        "optimizers and other things: give several optimizers of one model as a list of them, boost(model, [a, b]), "
        "and boost each model with its own",
    ),
    (
        LRScheduler,
        "learning rate schedulers, expected one: boost hands it back as it is. Leave the others out, they go on "
        "steering the same groups; or chain them with torch.optim.lr_scheduler.ChainedScheduler",
    ),
    (
        nn.Module,
        "models, expected one: boost each with its own optimizer (booster.boost(a, a_optimizer), "
        "booster.boost(b, b_optimizer)), or all as one model, nn.ModuleList(models)",
    ),
)


def _several(value: Any) -> str | None:
    """What to say about a collection of what can only be given once; None for anything else, such as a dataloader."""
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    else:
        return None
    for item in inside:
        for kind, says in _ONE_OF_EACH:
            if isinstance(item, kind):
                return says
        deeper = _several(item)
        if deeper is not None:
            return deeper
    return None
