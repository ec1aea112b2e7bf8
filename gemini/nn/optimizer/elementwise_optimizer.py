"""What a torch optimizer that runs as itself becomes when it is boosted."""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .managed import ManagedOptimizer
from .rules.elementwise_check import check_elementwise
from .rules.elementwise_rule import ElementwiseRule
from .rules.kind import Kind
from .rules.whole_check import check_whole
from .rules.whole_rule import WholeRule
from .unmanaged.fitting import called, check_gradient, check_parameter, check_state


class ElementwiseOptimizer(ManagedOptimizer):
    """Stands for a torch optimizer, with its groups, states and hooks; what it computes is what that one computes.

    The groups are the same dict objects, so learning rate schedulers made for the optimizer go on working.

    Parameters
    ----------
    kind, optimizer
        The optimizer, and what is known of its class.

    Raises
    ------
    ValueError
        If a group has an option that is not supported, or the arithmetic turns out not to be what is known of it.
    """

    rule: ElementwiseRule

    def __init__(self, kind: Kind, optimizer: Optimizer) -> None:
        self.rule = rule_of(kind, optimizer)
        for group in optimizer.param_groups:
            self.rule.refuse(group)
        if isinstance(self.rule, WholeRule):
            check_whole(self.rule, optimizer.param_groups)
        else:
            check_elementwise(self.rule, optimizer.param_groups)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        self._take_hooks(optimizer)

    @torch.no_grad()
    def prepare_parameters(
        self, group: Mapping[str, Any], params: Iterable[Tensor], grad_scale: float = 1.0
    ) -> list["PreparedCopy"]:
        options = self.rule.options_of(group)
        having = [param for param in params if param.grad is not None]
        for param in having:
            self._check(group, param)
        return [self._prepared(options, param, grad_scale) for param in having]

    def _check(self, group: Mapping[str, Any], param: Tensor) -> None:
        """Raise where torch's own step would, and also where its result could not be put into the parameter."""
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            raise TypeError(
                f"{self.rule.name} got a sparse gradient (parameter of shape {tuple(param.shape)}), which a boosted "
                "optimizer does not take; build the embedding with sparse=False"
            )
        what, known = called(group, param), self.state.get(param, {})
        check_parameter(param, what)
        check_gradient(param, param.grad, what)
        for slot in self.rule.slots(group):
            if isinstance(state := known.get(slot.name), Tensor):
                check_state(param, state, f"{slot.name} of {what}")

    def _prepared(self, options: Mapping[str, Any], param: Tensor, grad_scale: float) -> "PreparedCopy":
        assert param.grad is not None
        new, grad = param.detach().clone(), param.grad.detach().clone()
        new.grad = grad if grad_scale == 1.0 else grad.mul_(grad_scale)
        known = self.state.get(param, {})
        state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in known.items()}
        self.rule.run(options, new, state)
        return PreparedCopy(param, new.detach(), state)


def rule_of(kind: Kind, optimizer: Optimizer) -> ElementwiseRule:
    """The arithmetic of an optimizer of a kind that runs as itself."""
    return WholeRule(kind, optimizer) if kind.is_whole else ElementwiseRule(kind, optimizer)


@dataclass(frozen=True, slots=True)
class PreparedCopy:
    """A parameter's new value and state, beside the old ones."""

    param: Tensor
    new: Tensor
    state: dict[str, Any]

    def commit(self, states: MutableMapping[Any, dict[str, Any]]) -> None:
        """Put them into their places."""
        self.param.copy_(self.new)
        states[self.param] = self.state
