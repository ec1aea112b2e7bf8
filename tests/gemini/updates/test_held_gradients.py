"""Gradients on disk that somebody reads and holds: what is done to them counts, as in plain PyTorch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL, Trained, check_same
from torch import Tensor, nn

from gemini.updates.absent_gradient import AbsentGradient

ON_DISK: dict[str, Any] = {"host_memory": "300KiB", "offload_dir": "disk", **SMALL}
IN_RAM: dict[str, Any] = SMALL


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def add_gradients(each: Trained, number: int) -> None:
    torch.manual_seed(number)  # for the dropout
    each.backward(each.loss(number))


def kept(each: Trained) -> list[nn.Parameter]:
    return list(each.model.parameters())


def gradients(each: Trained) -> list[Tensor]:
    return [p.grad for p in kept(each)]  # type: ignore[misc]


def scale(held: list[Tensor], factor: float) -> None:
    with torch.no_grad():
        for gradient in held:
            gradient.mul_(factor)


def held_between_backwards(each: Trained) -> Iterator[Any]:
    for number in range(3):
        add_gradients(each, number)
        held = gradients(each)
        add_gradients(each, number + 100)
        yield [a is b for a, b in zip(held, gradients(each), strict=True)]
        scale(held, 0.5)
        each.optimizer.step()
        each.optimizer.zero_grad()


def held_and_zeroed(each: Trained, as_data: bool = False, looks: bool = True) -> Iterator[Any]:
    held: list[Tensor] = []
    for number in range(4):
        add_gradients(each, number)
        if number == 1:
            held = [gradient.data for gradient in gradients(each)] if as_data else gradients(each)
        scale(held, 0.5)
        each.optimizer.step()
        if looks:
            yield [torch.equal(a, b) for a, b in zip(held, gradients(each), strict=False)]
        each.optimizer.zero_grad(set_to_none=False)
        yield [float(gradient.abs().sum()) for gradient in held]


def held_as_data(each: Trained) -> Iterator[Any]:
    return held_and_zeroed(each, as_data=True, looks=False)


def held_and_zeroed_by_hand(each: Trained) -> Iterator[Any]:
    held: list[Tensor] = []
    for number in range(4):
        add_gradients(each, number)
        held = held or gradients(each)
        scale(held, 0.5)
        each.optimizer.step()
        scale(held, 0.0)
    yield [torch.equal(a, b) for a, b in zip(held, gradients(each), strict=True)]


def held_and_never_zeroed(each: Trained) -> Iterator[Any]:
    held: list[Tensor] = []
    for number in range(4):
        add_gradients(each, number)
        held = held or gradients(each)
        scale(held, 0.5)
        each.optimizer.step()
    yield [torch.equal(a, b) for a, b in zip(held, gradients(each), strict=True)]


def changed_before_a_step_without_a_backward(each: Trained) -> Iterator[Any]:
    add_gradients(each, 0)
    held = gradients(each)
    each.optimizer.step()
    scale(held, -3.0)
    each.optimizer.step()
    yield [torch.equal(a, b) for a, b in zip(held, gradients(each), strict=True)]


def put_there_and_zeroed_by_hand(each: Trained) -> Iterator[Any]:
    held = [torch.zeros_like(p) for p in kept(each)]
    for parameter, gradient in zip(kept(each), held, strict=True):
        parameter.grad = gradient
    for number in range(3):
        add_gradients(each, number)
        each.optimizer.step()
        yield [a is b for a, b in zip(held, gradients(each), strict=True)] if number == 1 else None
        if number == 1:
            each.optimizer.zero_grad(set_to_none=False)
            yield [float(gradient.abs().sum()) for gradient in held]
        else:
            scale(held, 0.0)


def held_for_two_steps(each: Trained) -> Iterator[Any]:
    for number in range(4):
        add_gradients(each, number)
        held = gradients(each) if number < 2 else []
        scale(held, 0.5)
        each.optimizer.step()
        held.clear()
    yield [float(gradient.norm()) for gradient in gradients(each)]


PROGRAMS = [
    held_between_backwards,
    held_and_zeroed,
    held_as_data,
    held_and_zeroed_by_hand,
    held_and_never_zeroed,
    changed_before_a_step_without_a_backward,
    put_there_and_zeroed_by_hand,
    held_for_two_steps,
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("placement", [ON_DISK, IN_RAM], ids=["disk", "RAM"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_is_done_to_a_held_gradient_counts(
    program: Callable[[Trained], Iterator[Any]], placement: dict[str, Any]
) -> None:
    ours, plain = Trained(placement), Trained(None)
    assert list(program(ours)) == list(program(plain))
    check_same(ours, plain)


def test_a_copy_that_nobody_holds_goes_when_gradients_are_added_or_taken() -> None:
    ours = Trained(ON_DISK)
    parameters = kept(ours)
    get: Any = torch._C.TensorBase.grad.__get__  # type: ignore[attr-defined]

    def copies() -> int:
        with torch._C.DisableTorchFunctionSubclass():
            return sum(
                g is not None and g._base is None and not isinstance(g, AbsentGradient) for g in map(get, parameters)
            )

    before = None
    for number in range(2):
        add_gradients(ours, number)
        before = copies()
        assert [float(p.grad.norm()) for p in parameters]  # type: ignore[union-attr]
        assert copies() > before
        add_gradients(ours, number + 100)
        assert copies() == before
        assert [float(p.grad.norm()) for p in parameters]  # type: ignore[union-attr]
        ours.optimizer.step()
        assert copies() == 0
