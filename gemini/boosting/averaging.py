"""`EMA` and `SWA`: running averages of a boosted model's parameters, kept in chunks beside the masters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..boosted import boosted
from ..checkpoint import checked_by_all, loaded_by_all
from ..chunk import MASTER
from ..updates.averages import Average, Equal, Exponential, Form
from .average_state import COUNT, PREFIX, checked_state


class RunningAverage:
    """An average of all parameters that follows each ``optimizer.step()``, in the pass that updates them.

    It is float32, as the masters are, takes 4 bytes a parameter beside these on their tier (on disk where RAM has no
    room), and has the bits of `torch.optim.swa_utils.AveragedModel` over a plain model whose ``update_parameters`` is
    called after every step, with the masters of now. A step that is skipped because its gradients overflowed is none.
    Buffers are no part of it (``use_buffers=False``), and parameters that are not trained are what they are.
    ``booster.save`` and ``booster.load`` with the model save and load it, too: in ``<name>.safetensors``.

    Parameters
    ----------
    model
        Boosted, with an optimizer.
    form
        How the average goes on.
    name
        Of this average, where a model has several.

    Raises
    ------
    TypeError
        If the model is not boosted.
    ValueError
        If it has no optimizer, or another average of this name.
    OutOfMemory
        If there is no room.
    """

    def __init__(self, model: nn.Module, form: Form, name: str) -> None:
        state = boosted(model)
        if state.optimizer is None:
            raise ValueError("an average follows the steps of an optimizer: boost the model with one")
        if not name.isidentifier() or any(name in chunk.specs for chunk in state.manager.chunks):
            raise ValueError(f"{name!r} cannot be the name of an average: it is taken, or no identifier")
        self._model = model
        self._manager, self._values, self._step = state.manager, state.values, state.step
        outside = [p for p in model.parameters() if p.requires_grad and self._manager.find(p) is None]
        self._average = Average(name, form, {p: p.detach().clone() for p in outside})
        self._step.add_average(self._average)

    @property
    def name(self) -> str:
        """Of the average."""
        return self._average.name

    @property
    def n_averaged(self) -> int:
        """How many steps it has taken in."""
        return self._average.count

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """A context in which the model has the average's values, for evaluation or for ``booster.save_model``.

        At its end it has its own again, bit by bit. It can neither be trained nor loaded in between, and what
        is written into its parameters by hand is written into the average.
        """
        self._check_open()
        self._step.averages.refuse_swapped("swap an average in")
        self._swap()
        try:
            yield self._model
        finally:
            self._swap()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The average of each parameter as a full tensor on CPU, one at a time, tied ones under their first name."""
        for name, parameter in self._model.named_parameters():
            yield name, self.read(parameter)

    def read(self, parameter: Tensor) -> Tensor:
        """The average of one parameter, on CPU; of one that is not trained, its value."""
        self._check_open()
        if (plain := self._average.plain.get(parameter)) is not None:
            return plain.detach().to("cpu", copy=True)
        place = self._manager.find(parameter)
        if place is None:
            return parameter.detach().to("cpu", copy=True)
        return self._values.read(parameter, self.name if self.name in place[0].specs else MASTER)

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Replace the average of one parameter; of one that is not trained there is none, and nothing is changed."""
        self._check_open()
        self._step.averages.refuse_swapped("replace an average")
        place = self._manager.find(parameter)
        if (plain := self._average.plain.get(parameter)) is not None:
            plain.copy_(value)
        elif place is not None and self.name in place[0].specs:
            self._values.write(parameter, self.name, value)

    def restore(self, count: int) -> None:
        """Go on as after ``count`` steps."""
        self._average.restore(count)

    def state_dict(self) -> dict[str, Any]:
        """All averages in RAM, with the names that `torch.optim.swa_utils.AveragedModel` gives them."""
        values = {PREFIX + name: value for name, value in self.named_tensors()}
        return {COUNT: torch.tensor(self.n_averaged), **values}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, or that of an `AveragedModel` over the same model.

        Raises
        ------
        TypeError
            If it is no mapping, or something in it is no tensor.
        ValueError
            If names are missing or unexpected, or a tensor or ``n_averaged`` is none that could be loaded. All of them
            are named. Nothing has been changed in both cases.
        RuntimeError
            While the model has the values of an average.
        """
        self._check_open()
        doing = f"load_state_dict of the average {self.name}"
        with checked_by_all(self._model, doing):
            values, count = checked_state(self._model, state_dict, self._dtype)
        with loaded_by_all(self._model, doing):
            for parameter, value in values.items():
                self.write(parameter, value)
            self.restore(count)

    def close(self) -> None:
        """End the average, and give its memory back."""
        self._check_open()
        self._step.averages.refuse_swapped("end an average")
        self._step.remove_average(self._average)

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        """Of the average of a parameter."""
        return parameter.dtype if self._manager.find(parameter) is None else torch.float32

    def _check_open(self) -> None:
        if self._average not in self._step.averages:
            raise RuntimeError(f"the average {self.name} has been closed: make another one")

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in self._average.plain.items():
                value = parameter.detach().clone()
                parameter.detach().copy_(average)
                average.copy_(value)
            self._step.swap(self._average)


class EMA(RunningAverage):
    """The exponential moving average of a boosted model's parameters. See `RunningAverage`.

    After each step ``average.lerp_(p, 1 - decay)``, as `torch.optim.swa_utils.get_ema_multi_avg_fn` does; the first one
    copies.

    Parameters
    ----------
    model
        Boosted, with an optimizer.
    decay
        Between 0 and 1.
    name
        Of this average, where a model has several.

    Examples
    --------
    >>> ema = gemini.EMA(model, decay=0.999)
    >>> for batch in loader:
    ...     booster.backward(model(**batch).loss, optimizer)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> with ema.swapped_in():
    ...     evaluate(model)
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, name: str = "ema") -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        super().__init__(model, Exponential(decay), name)


class SWA(RunningAverage):
    """The equal average of a boosted model's parameters over its steps. See `RunningAverage`.

    After each step ``average + (p - average) / (n + 1)``, as `torch.optim.swa_utils.get_swa_avg_fn` does. Made when the
    averaging is to begin, mostly late in training.

    Parameters
    ----------
    model
        Boosted, with an optimizer.
    name
        Of this average, where a model has several.
    """

    def __init__(self, model: nn.Module, name: str = "swa") -> None:
        super().__init__(model, Equal(), name)
