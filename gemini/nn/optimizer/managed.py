"""The base class of all boosted optimizers, and the protocol of the step that takes over their work."""

import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from gemini.colossal.boosted import OptimizerNames
from gemini.lazy.session import is_recording

from ...signals import uninterrupted
from ...torch_private import OPTIMIZER_HOOKS, mark_stepped
from .rules.rule import Rule
from .rules.rules import OneRule, Rules

_Self = TypeVar("_Self", bound="ManagedOptimizer")


class Prepared(Protocol):
    """One parameter's update, of which nothing has happened yet."""

    def commit(self, states: MutableMapping[Any, dict[str, Any]]) -> None:
        """Do it. It does not fail."""


class ManagedStep(Protocol):
    """What a boosted optimizer hands its work to. Each method replaces the one of the same name.

    The optimizer's own parts stay at hand for parameters that are not in chunks:
    ``ManagedOptimizer.prepare_parameters``, ``commit_parameters`` and ``register_param_group``.
    """

    def backward(self, loss: Tensor) -> None:
        """Run backward on the loss, scaled where gradients are."""

    def gradient_norm(self) -> float | None:
        """The last norm of all gradients that was computed, unscaled; None before that."""

    def was_skipped(self) -> bool:
        """True if the last step was skipped because gradients overflowed."""

    def step(self, optimizer: "ManagedOptimizer") -> None:
        """Update every parameter that has a gradient. The closure, if any, has run."""

    def zero_grad(self, optimizer: "ManagedOptimizer", set_to_none: bool) -> None:
        """Forget the gradients, or fill them with zeros."""

    def state_dict(self, optimizer: "ManagedOptimizer") -> dict[str, Any]:
        """Return the states in the layout of the torch optimizer that this one stands for."""

    def load_state_dict(self, optimizer: "ManagedOptimizer", state_dict: dict[str, Any]) -> None:
        """Take over states in the layout of the torch optimizer that this one stands for."""

    def states(self, optimizer: "ManagedOptimizer") -> MutableMapping[Any, Any]:
        """Return what ``optimizer.state`` is."""

    def replace_states(self, optimizer: "ManagedOptimizer", states: Mapping[Any, Any]) -> None:
        """Take over a mapping that was assigned to ``optimizer.state``."""

    def add_param_group(self, optimizer: "ManagedOptimizer", group: dict[str, Any]) -> None:
        """Add a group after boosting, or raise."""

    def clip_grad_by_norm(
        self,
        optimizer: "ManagedOptimizer",
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        parameters: Iterable[Tensor],
    ) -> Tensor:
        """Arrange that the next step uses clipped gradients; return the norm before clipping."""

    def clip_grad_by_value(self, optimizer: "ManagedOptimizer", value: float) -> None:
        """Arrange that the next step uses gradients clamped to ``[-value, value]``."""


class ManagedOptimizer(OptimizerNames, Optimizer):
    """A ``torch.optim.Optimizer`` whose parameters may be in the chunks of a boosted model.

    Subclasses say what their arithmetic is (``rule``), and how parameters outside of chunks take a step
    (``prepare_parameters``).
    """

    _managed: ManagedStep | None
    """Who does the work once boosted. Not on the class: wrappers that are subclasses of the optimizer's class without
    having its attributes, such as Lightning's, ask the optimizer for what they do not find."""

    rule: Rule
    """The arithmetic, of those that have one for all parameters."""

    stands_for: Callable[[], Optimizer | None]
    """The optimizer whose place this one has taken, if there is one and somebody still has it."""

    parts: tuple["ManagedOptimizer", ...] = ()
    """The optimizers that it consists of, if these are several."""

    _whole: Callable[[], "ManagedOptimizer | None"]

    def __new__(cls: type[_Self], *args: Any, **kwargs: Any) -> _Self:
        optimizer = super().__new__(cls)
        optimizer._managed = None  # before __init__, in which ``Optimizer`` calls our methods already
        optimizer.stands_for = lambda: None
        optimizer._whole = lambda: None
        return optimizer

    @property
    def rules(self) -> Rules:
        """The arithmetic of each parameter."""
        return OneRule(self.rule)

    @property
    def whole(self) -> "ManagedOptimizer":
        """The optimizer of all that the model's step updates; another one if this is one of several."""
        of_all = self._whole()
        return self if of_all is None else of_all

    @property
    def itself(self) -> "ManagedOptimizer":
        """Also of the optimizer whose place this one has taken."""
        return self

    def join(self, of_all: "ManagedOptimizer") -> None:
        """Be one of several optimizers of a model."""
        self._whole = weakref.ref(of_all)

    def be_managed(self, step: ManagedStep) -> None:
        """Hand the work over from now on."""
        self._managed = step

    @property
    def state(self) -> Any:
        """The states by parameter, as in ``torch.optim``; once boosted they are shown from where they are."""
        return self.outside if self._managed is None else self._managed.states(self)

    @state.setter
    def state(self, states: MutableMapping[Any, Any]) -> None:
        if self._managed is None:
            self.__dict__["state"] = states
        else:
            self._managed.replace_states(self, states)

    @property
    def outside(self) -> MutableMapping[Any, Any]:
        """The states of parameters that are in no chunk, and whatever else has been put there."""
        own = self.__dict__.get("state")
        if own is None:
            raise AttributeError(f"{type(self).__name__} has no state of its own")  # a wrapper asks its optimizer then
        return own  # type: ignore[no-any-return]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Parameters
        ----------
        closure
            Called first, with gradients enabled; its result is returned.

        Raises
        ------
        TypeError
            If a gradient is sparse or of a dtype that cannot be used.
        Exception
            Also what an allocation raises. Parameters and states are as they were before then, so that the step can be
            repeated. (Without numba the arithmetic itself allocates, and may stop between two parameters.)
        """
        if is_recording():
            raise RuntimeError(
                f"{type(self).__name__}.step was called inside LazyInitContext, which records instead of computing; "
                "leave the context before training"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def before_step(self) -> None:
        """Call the hooks that come before a step, for one that takes this optimizer's as well."""
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, (), {})

    def after_step(self) -> None:
        """Call the hooks that come after a step, for one that has taken this optimizer's as well."""
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (), {})

    @property
    def step_was_skipped(self) -> bool:
        """True if the last step changed nothing because gradients overflowed fp16 at this loss scale."""
        return self._managed is not None and self._managed.was_skipped()

    @uninterrupted  # around the other: an interrupt within `no_grad` would leave gradients disabled
    @torch.no_grad()
    def _step(self) -> None:
        if self._managed is not None:
            self._managed.step(self)
            return
        # Everything that can fail happens before the first parameter changes.
        work = [step for group in self.param_groups for step in self.prepare_parameters(group, group["params"])]
        self.commit_parameters(work)

    def prepare_parameters(
        self, group: Mapping[str, Any], params: Iterable[Tensor], grad_scale: float = 1.0
    ) -> Sequence[Prepared]:
        """Make ready one step of some parameters, with the hyperparameters of ``group``; see `commit_parameters`.

        Parameters
        ----------
        group
            One of ``param_groups``.
        params
            Parameters of that group; those without a gradient are not touched.
        grad_scale
            Multiplied into the gradients on the fly; they are not changed.
        """
        raise NotImplementedError

    @torch.no_grad()
    def commit_parameters(self, prepared: Iterable[Prepared]) -> None:
        """Do what `prepare_parameters` made ready. It does not fail."""
        for step in prepared:
            step.commit(self.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        # A wrapper of the optimizer's class may have been made without it; parameters clear their gradients, too.
        managed = getattr(self, "_managed", None)
        if managed is not None:
            managed.zero_grad(self, set_to_none)
        else:
            super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not say is taken from the constructor's arguments."""
        if self._managed is not None:
            self._managed.add_param_group(self, param_group)
        else:
            self.register_param_group(param_group)

    def register_param_group(self, group: dict[str, Any]) -> None:
        """Validate and add a group, managed or not; for the manager.

        Raises
        ------
        TypeError
            If a parameter cannot be trained.
        ValueError
            If a hyperparameter is out of range. In both cases no group has been added.
        """
        super().add_param_group(group)

    def exported_state(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter outside of chunks as a state dict has it; empty if it has none."""
        return dict(self.state.get(param, {}))

    def restore_state(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Give a parameter outside of chunks a state that came from a state dict. Copies."""
        tensors = {
            name: value.to(param.device, copy=True) for name, value in saved.items() if isinstance(value, Tensor)
        }
        steps = {"step": self.rule.counted(int(saved["step"]))} if "step" in saved else {}
        self.state[param] = {**saved, **tensors, **steps}

    def saved_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a group as a state dict has them, without the parameters."""
        return {name: value for name, value in group.items() if name != "params"}

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups, in the layout of the torch optimizer that this one stands for."""
        if self._managed is None:
            return super().state_dict()
        self.before_state_dict()
        state_dict = self._managed.state_dict(self)
        for hook in list(self._optimizer_state_dict_post_hooks.values()):
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def before_state_dict(self) -> None:
        """Call the hooks that come before a state dict is made, or before something is saved that stands for one."""
        for hook in list(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)

    @property
    def has_state_dict_post_hooks(self) -> bool:
        """True if hooks are to see a state dict that is saved, and may change it."""
        return bool(self._optimizer_state_dict_post_hooks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict in the layout of the torch optimizer that this one stands for. Tensors are copied.

        Raises
        ------
        ValueError
            If it does not fit these parameters or asks for an option that is not supported. Nothing has changed then.
        """
        if self._managed is None:
            super().load_state_dict(state_dict)
            return
        self._managed.load_state_dict(self, self.before_load_state_dict(state_dict))
        self.after_load_state_dict()

    def before_load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what hooks want to be loaded instead of a state dict, which is not changed."""
        state_dict = state_dict.copy()
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def after_load_state_dict(self) -> None:
        """Call the hooks that come when a state dict has been loaded."""
        for hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            hook(self)

    @property
    def has_load_state_dict_pre_hooks(self) -> bool:
        """True if hooks are to see a state dict before it is loaded, and may change it."""
        return bool(self._optimizer_load_state_dict_pre_hooks)

    def __getstate__(self) -> dict[str, Any]:
        if self._managed is not None:
            raise TypeError(
                "a boosted optimizer cannot be pickled or deep-copied: its states are in chunks; "
                "use booster.save_optimizer, or optimizer.state_dict()"
            )
        return super().__getstate__()

    def clip_grad_by_norm(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        parameters: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Scale the gradients of all parameters so that their norm together is at most ``max_norm``.

        Parameters
        ----------
        parameters
            The optimizer's parameters in another order than that of its groups. The norm is one of norms, and its
            rounding depends on their order: ``model.parameters()`` gives the bits of
            ``torch.nn.utils.clip_grad_norm_(model.parameters(), ...)``.

        Returns
        -------
        Tensor
            The norm before clipping.
        """
        in_order = self._parameters() if parameters is None else list(parameters)
        if self._managed is not None:
            return self._managed.clip_grad_by_norm(self, max_norm, norm_type, error_if_nonfinite, in_order)
        return torch.nn.utils.clip_grad_norm_(in_order, max_norm, norm_type, error_if_nonfinite)

    def clip_grad_by_value(self, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]``."""
        if self._managed is not None:
            self._managed.clip_grad_by_value(self, clip_value)
        else:
            torch.nn.utils.clip_grad_value_(self._parameters(), clip_value)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _take_hooks(self, optimizer: Optimizer) -> None:
        """Go on with the hooks and schedulers of an optimizer whose place this one takes."""
        for name in OPTIMIZER_HOOKS:  # the dicts themselves: the users' removable handles go on working
            setattr(self, name, getattr(optimizer, name))
        self.stands_for = weakref.ref(optimizer)
        mark_stepped(optimizer)  # a scheduler made for it asks it, not the one that steps in its place
