"""A torch optimizer that looks at whole parameters as a rule: its own ``step`` on one parameter in its shape.

It works on copies, and what it has done is copied back at the end, which does not fail: so a step of a parameter is all
or nothing. Matrices are large, so that the copies cost little beside what it computes of them.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .elementwise_rule import ElementwiseRule, Step
from .rule import BoundUpdate, Form


class WholeRule(ElementwiseRule):
    """A torch optimizer that is given one whole parameter at a time (a `Rule`)."""

    def update(self, step: Step, form: Form | None) -> BoundUpdate:
        assert form is not None
        return WholeUpdate(self, step, form)


class WholeUpdate:
    """One step of one parameter (a `BoundUpdate`). Its side states are replaced when it has been computed."""

    def __init__(self, rule: WholeRule, step: Step, form: Form) -> None:
        self._rule = rule
        self._step = step
        self._form = form

    def atomic_numel(self, device: torch.device) -> int | None:
        return None

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        if param.device.type == "cpu":
            with_all_threads(lambda: self._apply(param, states, grad))
        else:
            self._apply(param, states, grad)
        if out is not None:
            out.copy_(param)

    @torch.no_grad()
    def _apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor) -> None:
        new, gradient = (self._shaped(flat.to(torch.float32, copy=True)) for flat in (param, grad))
        if self._step.grad_scale != 1.0:
            gradient.mul_(self._step.grad_scale)
        new.grad = gradient
        named = {name: self._shaped(flat.clone()) for name, flat in zip(self._step.names, states, strict=True)}
        known = {name: value.to(param.device) for name, value in self._form.side.items()}
        state = self._rule.state_before(self._step.number, named, self._step.is_fresh, known)
        self._rule.run(self._step.options, new, state)
        side = {name: torch.as_tensor(state[name], dtype=torch.float32) for name in self._rule.side(self._form.shape)}
        self._shaped(param).copy_(new)
        for name, flat in zip(self._step.names, states, strict=True):
            if (value := state.get(name)) is not None:
                self._shaped(flat).copy_(value)
        self._form.side.update(side)

    def _shaped(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self._form.shape, self._form.stride, flat.storage_offset())


def with_all_threads(work: Callable[[], None]) -> None:
    """Do work on a thread that computes with as many threads as the process, and wait for it.

    Threads in the background compute alone, and sums of several threads have other bits than those of one.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            torch.get_num_threads()  # asking is what gives a new thread its number
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="whole-update")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
