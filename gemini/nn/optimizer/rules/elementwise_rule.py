"""A torch optimizer as a rule: its own ``step`` on pieces of flat buffers.

The optimizer writes in place, straight into the chunks. What it may write is copied first, a piece at a time so that
the copies stay in the caches, and put back when an allocation fails on the way. Pieces are also what makes its
temporaries small: run over a whole buffer each of them would go through DRAM.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gemini.chunk import Codec, Plain

from . import pieces
from .kind import LOOK_AT_WHOLE_TENSORS, Kind
from .rule import BoundRule, BoundUpdate, BufferSpec, Form, counted
from .sgd import SgdUpdate, is_plain_form

_REFUSED = ("differentiable", "capturable")
_OTHER_BITS_IN_LISTS = (torch.optim.RAdam, torch.optim.NAdam, torch.optim.ASGD)
"""Their form for lists of tensors (``foreach``), torch's on accelerators, rounds otherwise than that for one tensor."""
_GROUP_STEP = "step"
"""What some optimizers count their steps by, in each group."""


class ElementwiseRule:
    """An element-wise torch optimizer (a `Rule`).

    Parameters
    ----------
    kind
        What is known of its class.
    optimizer
        Its arguments and attributes; parameters and states are not looked at.
    """

    def __init__(self, kind: Kind, optimizer: Optimizer) -> None:
        self.kind = kind
        self.name = kind.name
        self.takes_step = kind.takes_step
        self.is_whole = kind.is_whole
        self.kept_in_group: tuple[str, ...] = (_GROUP_STEP,) if kind.counts_in_group else ()
        self.has_initial_state = kind.initial is not None
        self._initial = kind.initial(optimizer.defaults) if kind.initial is not None else {}
        self._step = _own_step(kind.cls)
        left_out = ("param_groups", "state", "step")  # schedulers put a wrapped step there
        self._attributes = {name: value for name, value in vars(optimizer).items() if name not in left_out}
        self._options = dict(optimizer.defaults)
        self._counts_with_int: bool | None = False if kind.cls.__module__.startswith("torch.") else None

    def slots(self, group: Mapping[str, Any]) -> tuple[BufferSpec, ...]:
        return tuple(BufferSpec(name) for name in self.kind.states(group))

    def codecs(self, slots: Sequence[BufferSpec]) -> dict[str, Codec]:
        return {spec.name: Plain(spec) for spec in slots}

    def keeps_state(self, group: Mapping[str, Any]) -> bool:
        return self.kind.keeps_state(group)

    def initial(self, name: str) -> float:
        return float(self._initial.get(name, 0.0))

    def side(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        return self.kind.side(shape)

    def counted(self, steps: int) -> Any:
        if self._counts_with_int is None:  # found out by a step: numbers computed with either differ
            state: dict[str, Any] = {}
            self.run(self.options_of(self._options), _one(), state)
            self._counts_with_int = isinstance(state.get("step"), int)
        return steps if self._counts_with_int else counted(steps)

    def refuse(self, group: Mapping[str, Any]) -> None:
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{self.name}({option}=True) cannot be boosted; set it to False, or train unmanaged")
        allowed = self.kind.options
        for option in () if allowed is None else (*self._options, *(LOOK_AT_WHOLE_TENSORS & group.keys())):
            if allowed is not None and option not in allowed and group.get(option):
                raise ValueError(
                    f"{self.name}({option}={group[option]!r}) cannot be boosted: it is not known to treat each element "
                    "by itself; leave it out, or train unmanaged"
                )

    def bind(self, group: Mapping[str, Any], slots: Sequence[BufferSpec]) -> BoundRule:
        self.refuse(group)
        missing = [slot.name for slot in self.slots(group) if slot not in slots]
        if missing:
            raise ValueError(
                f"{self.name} needs {', '.join(missing)} with the options that a group has now, and had no need of it "
                "when it was boosted, so there is no room for it; set these options before booster.boost"
            )
        # A copy: the step may be done when the user has changed the group for the next.
        options = self.options_of(group)
        names = tuple(slot.name for slot in slots)

        def at_step(
            step: int, grad_scale: float, is_fresh: bool | None = None, form: Form | None = None
        ) -> BoundUpdate:
            is_first = step == 1 if is_fresh is None else is_fresh
            return self.update(Step(options, names, step, grad_scale, is_first), form)

        return at_step

    def options_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the options of a group, as a step finds them."""
        begun = dict.fromkeys(self.kept_in_group, 0)
        kept = {k: _kept(value) for k, value in group.items() if k not in ("params", "param_names")}
        if self.kind.cls in _OTHER_BITS_IN_LISTS and kept["foreach"] is None:
            # What torch takes for the parameter's device, also for pieces that are at home on the CPU.
            on_device = any(parameter.device.type != "cpu" for parameter in group.get("params", ())[:1])
            kept["foreach"] = True if on_device and not isinstance(kept["lr"], Tensor) else None
        return {**begun, **kept}

    def update(self, step: "Step", form: Form | None) -> BoundUpdate:
        """One step."""
        if self.kind.cls is torch.optim.SGD and is_plain_form(step.options):
            return SgdUpdate.of(step.options, step.number, step.grad_scale)
        return ElementwiseUpdate(self, step, {} if form is None else form.side)

    def run(self, options: Mapping[str, Any], param: Tensor, state: dict[str, Any]) -> list[str]:
        """Let the optimizer take one step of ``param``, which has its gradient; ``state`` is written, too.

        Returns
        -------
        list
            Options and attributes that the optimizer has replaced. They are forgotten.
        """
        scratch = self.kind.cls.__new__(self.kind.cls)
        vars(scratch).update(self._attributes)
        scratch.param_groups = [{**options, "params": [param]}]
        scratch.state = defaultdict(dict)
        scratch.state[param] = state
        self._step(scratch)
        state.update(scratch.state[param])
        (group,) = scratch.param_groups
        as_is = {"params": group["params"], **{name: options[name] + 1 for name in self.kept_in_group}}
        replaced = [n for n, v in group.items() if v is not options.get(n) and not (n in as_is and v == as_is[n])]
        return replaced + [
            name
            for name, value in vars(scratch).items()
            if name not in ("param_groups", "state") and value is not self._attributes.get(name)
        ]

    def state_before(
        self, step: int, states: Mapping[str, Tensor], is_fresh: bool, side: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """The state that the optimizer finds in its step of this number; it gets copies of the side states."""
        if is_fresh and not self.has_initial_state:
            return {}  # it makes them itself
        steps: dict[str, Any] = {"step": self.counted(step - 1)} if self.takes_step else {}
        return {**steps, **states, **{name: value.clone() for name, value in (side or {}).items()}}

    def after_step(self, param_groups: Sequence[Any]) -> None:
        """Count a step that has been taken in the groups."""
        for group in param_groups:
            for name in self.kept_in_group:
                group[name] = group.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of a group's parameters is made of."""

    options: Mapping[str, Any]
    names: Sequence[str]
    """Of the states, in the order of the buffers."""
    number: int
    grad_scale: float
    is_fresh: bool
    """The parameters have no state yet."""


class ElementwiseUpdate:
    """One step of a torch optimizer (a `BoundSideUpdate`)."""

    def __init__(self, rule: ElementwiseRule, step: Step, side: Mapping[str, Tensor]) -> None:
        self._rule = rule
        self._step = step
        self._side = side
        self._side_after: dict[str, Tensor] | None = None

    def side_after(self) -> Mapping[str, Tensor]:
        names = self._rule.side((1,))
        if self._side_after is None:
            self._side_after = {}
        if names and not self._side_after:
            param = _one()
            states = {name: torch.zeros_like(param) for name in self._step.names}
            state = self._rule.state_before(self._step.number, states, self._step.is_fresh, self._side)
            with torch.no_grad():
                self._rule.run(self._step.options, param, state)
            self._side_after = {name: _scalar(state[name]) for name in names}
        return self._side_after

    def atomic_numel(self, device: torch.device) -> int | None:
        return pieces.atomic_numel(device)

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        def work(piece: slice) -> None:
            self._apply(param[piece], [state[piece] for state in states], grad[piece])

        for group in pieces.groups(param.numel(), param.device):
            pieces.run_or_put_back(work, group, [param, *states])
            if out is not None:
                pieces.run(lambda piece: out[piece].copy_(param[piece]), group, param.device)

    def _apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor) -> None:
        grad = grad.to(torch.float32, copy=True)  # a copy, since the optimizer may write into it
        if self._step.grad_scale != 1.0:
            grad.mul_(self._step.grad_scale)
        named = dict(zip(self._step.names, states, strict=True))
        state = self._rule.state_before(self._step.number, named, self._step.is_fresh, self._side)
        seen = param.view(param.shape)  # its own object: `grad` and ``.data`` are set on it
        seen.grad = grad
        self._rule.run(self._step.options, seen, state)
        for tensor, new in ((param, seen), *((named[name], state.get(name)) for name in self._step.names)):
            if new is not None and new.data_ptr() != tensor.data_ptr():
                tensor.copy_(new)


def _one() -> Tensor:
    """A parameter of one element, with a gradient."""
    param = torch.zeros(1, dtype=torch.float32, device="cpu")
    param.grad = torch.ones_like(param)
    return param


def _scalar(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").detach().clone()


def _kept(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, Tensor | list | dict) else value


def _own_step(cls: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """``cls.step`` without what torch wraps around it: hooks of all optimizers, profiling, a look at dynamo."""
    step: Any = cls.step
    while hasattr(step, "__wrapped__") and getattr(step, "__globals__", {}).get("__name__") == "torch.optim.optimizer":
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]
