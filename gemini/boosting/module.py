"""What a boosted model can do besides what it could before."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import full_state_dict, load_by_modules, load_named, own_loading
from ..monitor.stats import summary
from ..units.bracket import refuse_compilation
from .parts import refuse_conversion


class GeminiModule(nn.Module):
    """Mixed into the class of a boosted model; the object, its attributes, hooks and names stay the user's.

    Parameters have plain PyTorch's meaning between steps, however they are reached: their chunks come when an operation
    asks for their values.
    """

    _gemini: Any  # a Boosted; not written as such, because transformers evaluates the hints of a model's class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_compilation()
        self._gemini.manager.origin.refuse_elsewhere()
        return self._gemini.hooks.call(super().__call__, args, kwargs)

    def memory_stats(self) -> dict[str, int | float]:
        """Bytes, counts and seconds as a flat dict, for loggers; `memory_summary` explains them in words."""
        stats: dict[str, int | float] = self._gemini.stats()
        return stats

    def memory_summary(self) -> str:
        """The statistics as a table, for people."""
        budgets = self._gemini.capacities.budgets
        return summary(self._gemini.stats(), {tier: budget.source for tier, budget in budgets.items()})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients (or fill them with zeros), those in the chunks too."""
        self._gemini.step.zero_gradients(set_to_none)
        super().zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Gather every parameter (fp32 master where there is one) and buffer on CPU, ties under each of their names.

        This holds the whole model in RAM; `gemini.named_tensors` and `booster.save_model` do not.
        """
        return full_state_dict(self, super().state_dict, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy values into the homes (masters, then full copies made anew). ``assign`` makes no difference.

        Where a module has hooks of the user's on this, or overrides it, torch's own goes from module to module.
        """
        if own_loading(self) is not None:
            return load_by_modules(self, state_dict, strict)
        return load_named(self, state_dict, strict)

    def _apply(self, fn: Any, recurse: bool = True) -> "GeminiModule":
        refuse_conversion(self, fn, recurse, "a boosted model")
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "a boosted model cannot be replicated by torch.nn.DataParallel: its parameters live in chunks. "
            "Run one process per device with torchrun"
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """What DistributedDataParallel asks a module first. Others, who look at all attributes, find none."""
        if sys._getframe(1).f_globals.get("__name__") != DistributedDataParallel.__module__:
            raise AttributeError("_ddp_params_and_buffers_to_ignore")
        raise RuntimeError(
            "a boosted model cannot be within DistributedDataParallel: its chunks sum the gradients of the ranks "
            "themselves. Leave the wrapper off; in accelerate, use gemini.integrations.accelerator.ManagedAccelerator"
        )

    def __init_subclass__(cls, **options: Any) -> None:
        """Not the user's own hook, which may want options and keeps lists of the classes that the user writes."""

    def __copy__(self) -> Any:
        raise RuntimeError(
            "a boosted model cannot be copied, not even with the same parameters (copy.copy): what a forward brings "
            "and takes is kept once. Use the model itself, or build a second one and load model.state_dict() into it"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            "a boosted model cannot be copied: its parameters live in chunks. Build a second model and load "
            "model.state_dict() into it. For an average of its parameters (AveragedModel) use gemini.EMA(model) or "
            "gemini.SWA(model), which keep it in chunks, or AveragedModel(second_model)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a boosted model cannot be pickled: its parameters live in chunks. Save it with booster.save_model, "
            "or pickle model.state_dict()"
        )
