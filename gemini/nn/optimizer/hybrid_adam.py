"""``HybridAdam``: Adam and AdamW for parameters on any tier."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from gemini.arguments.checked import Table, checked
from gemini.arguments.places import Name
from gemini.arguments.rules import Has, OneOf, OrNone, Real, Unchecked

from .managed import ManagedOptimizer, Prepared
from .rules import moments
from .rules.adam_rule import ADAM, AdamRule
from .rules.group_options import TORCH_DEFAULTS, completed, refuse_options
from .unmanaged.fitting import check_dtype
from .unmanaged.parameter_state import check_saved, exported, restored
from .unmanaged.prepared import prepare

_Self = TypeVar("_Self", bound="HybridAdam")


_BY_GROUP = Unchecked("an option of each group, see option_ranges.py")
_ARGUMENTS: Table = {
    "model_params": Has(("__iter__",), "parameters, named parameters, or dicts that define groups"),
    "lr": _BY_GROUP,
    "bias_correction": _BY_GROUP,
    "betas": _BY_GROUP,
    "eps": _BY_GROUP,
    "weight_decay": _BY_GROUP,
    "adamw_mode": _BY_GROUP,
    "nvme_offload_fraction": Real(0, 1),
    "nvme_offload_dir": OrNone(Name()),
    "states": OneOf(tuple(moments.CODECS)),
}


class _SavedState:
    """Wraps a saved state while ``Optimizer.load_state_dict`` has it, which would cast it to the parameter's dtype.

    For a bfloat16 parameter that would round the float32 moments and the master.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self.saved = saved


class HybridAdam(ManagedOptimizer):
    """Adam or AdamW, on its own for CPU and CUDA parameters, or for the chunks of a boosted model.

    In float32 the numbers are those of ``torch.optim.AdamW(fused=True)`` on CPU, bit for bit where every tensor's
    length is a multiple of 16. Parameters in bfloat16 and float16 train through a float32 master copy, which starts
    from the parameter's value. Parameters whose gradient is None are not touched at all.

    Parameters
    ----------
    model_params
        Parameters, named parameters, or dicts that define groups; each group may have its own of the values below.
    lr
        Learning rate.
    bias_correction
        Whether the moments are divided by ``1 - beta**step``.
    betas
        Decay of the first and of the second moment.
    eps
        Added to the denominator.
    weight_decay
        See ``adamw_mode``.
    adamw_mode
        True: AdamW, the parameter shrinks by ``lr * weight_decay``. False: Adam, an L2 term joins the gradient.
    nvme_offload_fraction, nvme_offload_dir
        Accepted for ColossalAI's users; the fraction must be 0. Where states live is decided for the whole model by
        ``GeminiPlugin``.
    states
        How the two moments are kept. ``"bf16"`` (4 bytes a parameter) and ``"8bit"`` (2.03 bytes) **change the
        numbers**: moments are rounded after each step, so training takes another path to about the same loss. What is
        rounded how is written at [Note: Reduced states] in ``reduced.py``. They too are reproducible bit for bit, and
        the same wherever the parameters are.

    Raises
    ------
    ValueError
        If a value is out of range or ``nvme_offload_fraction`` is not 0.
    TypeError
        If a parameter is complex or of another dtype that Adam cannot train, or float64 with reduced ``states``.

    Notes
    -----
    State dicts load into and from ``torch.optim.Adam`` and ``AdamW``, and into any ``states``; their moments are
    float32. Loading copies, and rounds to nearest.
    """

    # Not with values: see `ManagedOptimizer._managed`.
    rule: AdamRule
    nvme_offload_fraction: float
    nvme_offload_dir: str | None

    @checked(_ARGUMENTS)
    def __init__(
        self,
        model_params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_mode: bool = True,
        nvme_offload_fraction: float = 0.0,
        nvme_offload_dir: str | None = None,
        *,
        states: str = "fp32",
    ) -> None:
        self.rule = AdamRule(states)
        if nvme_offload_fraction != 0.0:
            raise ValueError(
                f"nvme_offload_fraction={nvme_offload_fraction}: placing states on disk is the plugin's work. "
                "Leave it at 0 and give the plugin a folder: GeminiPlugin(offload_dir=...)"
            )
        self.nvme_offload_fraction = nvme_offload_fraction
        self.nvme_offload_dir = None if nvme_offload_dir is None else str(nvme_offload_dir)
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adamw_mode": adamw_mode,
        }
        super().__init__(model_params, completed(own, TORCH_DEFAULTS))

    @classmethod
    def from_torch(cls: type[_Self], optimizer: torch.optim.Adam) -> _Self:
        """Take over a ``torch.optim.Adam`` or ``AdamW``: its groups, states and hooks.

        The groups are the same dict objects, so learning rate schedulers made for ``optimizer`` go on working. The
        states move: ``optimizer`` has none afterwards and should not be used any more.

        Raises
        ------
        TypeError
            If ``optimizer`` is something else, subclasses included: they may compute something else.
        ValueError
            If it uses ``amsgrad``, ``maximize`` or ``differentiable``.
        """
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            raise TypeError(f"expected a torch.optim.Adam or torch.optim.AdamW, got {type(optimizer).__qualname__}")
        for group in optimizer.param_groups:
            refuse_options(group)
            for param in group["params"]:
                if optimizer.state.get(param):
                    check_saved(optimizer.state[param], param, "from_torch")
        hybrid = cls.__new__(cls)
        hybrid.rule, hybrid.nvme_offload_fraction, hybrid.nvme_offload_dir = ADAM, 0.0, None
        defaults = {name: value for name, value in optimizer.defaults.items() if name != "adamw_mode"}
        own = completed({"bias_correction": True, **defaults}, {**TORCH_DEFAULTS, "adamw_mode": True})
        # The groups themselves, not copies: register_param_group completes them in place.
        Optimizer.__init__(hybrid, optimizer.param_groups, own)
        for param, saved in optimizer.state.items():
            if saved:
                hybrid.state[param] = restored(saved, param, copy=False)
        optimizer.state.clear()
        hybrid._take_hooks(optimizer)
        return hybrid

    @torch.no_grad()
    def prepare_parameters(
        self, group: Mapping[str, Any], params: Iterable[Tensor], grad_scale: float = 1.0
    ) -> list[Prepared]:
        return prepare(group, params, self.state, grad_scale, self.rule.states)

    def register_param_group(self, group: dict[str, Any]) -> None:
        group.update(completed(group, self.defaults))
        super().register_param_group(group)
        try:
            for param in group["params"]:
                check_dtype(param, self.rule.states)
        except TypeError:
            self.param_groups.pop()
            raise

    def exported_state(self, param: Tensor) -> dict[str, Any]:
        return exported(self.state.get(param, {}), param, self.rule.states)

    def restore_state(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        self.state[param] = restored(saved, param, copy=True, states=self.rule.states)

    def saved_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # Users change the one, torch reads the other.
        return {**super().saved_options(group), "decoupled_weight_decay": group["adamw_mode"]}

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups, in the layout of ``torch.optim.AdamW``."""
        for group in self.param_groups:
            group.update(self.saved_options(group))
        if self._managed is not None:
            return super().state_dict()
        # First of the post-hooks, so that the users' hooks see what they get.
        handle = self.register_state_dict_post_hook(HybridAdam._export, prepend=True)  # type: ignore[arg-type]
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _export(self, state_dict: dict[str, Any]) -> None:
        params, states = self._parameters(), self.rule.states
        state_dict["state"] = {
            key: exported(state, params[key], states) if isinstance(key, int) else state
            for key, state in state_dict["state"].items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of a ``HybridAdam``, ``torch.optim.Adam`` or ``AdamW``. Tensors are copied.

        Raises
        ------
        ValueError
            If it does not fit these parameters or asks for an option that is not supported. Nothing has changed then.
        """
        if self._managed is not None:
            super().load_state_dict(state_dict)
            return
        # Last of the pre-hooks, so that it sees what the users' hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(HybridAdam._wrap_saved)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _wrap_saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                f"the loaded state has groups of {[len(g['params']) for g in saved_groups]} parameters, "
                f"this optimizer {[len(g['params']) for g in self.param_groups]}"
            )
        groups, states = [], dict(state_dict["state"])
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            present = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            groups.append(completed(saved_group, present))
            for index, param in zip(saved_group["params"], group["params"], strict=True):
                if index in states:
                    check_saved(states[index], param, f"parameter {index}")
                    states[index] = _SavedState(states[index])
        return {**state_dict, "state": states, "param_groups": groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for param, saved in state["state"].items():
            if isinstance(saved, _SavedState):
                state["state"][param] = restored(saved.saved, param, copy=True, states=self.rule.states)
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "nvme_offload_fraction": self.nvme_offload_fraction,
            "nvme_offload_dir": self.nvme_offload_dir,
            "rule": self.rule,
        }
