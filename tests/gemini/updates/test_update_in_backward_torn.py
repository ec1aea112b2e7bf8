"""A backward that fails with ``update_in_backward=True``: a torn step, which loading a checkpoint heals."""

from collections.abc import Callable
from typing import Any

import pytest
from backward_runs import Run, everywhere, updates_of
from loop import batch, check_same
from torch import Tensor, nn

from gemini.errors import OutOfMemory, TornStep
from gemini.updates.during_backward import Progress

pytestmark = pytest.mark.timeout(60)


class Fails(nn.Module):
    """Passes on, and fails in a chosen backward."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(self.backward_hook)
        return x

    def backward_hook(self, gradient: Tensor) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Breaking(Run):
    """Has a place in its backward that can fail, when some of it has run."""

    def __init__(self, placement: dict[str, Any] | None, at: int, **plugin: Any) -> None:
        self.at = at
        super().__init__(placement, **plugin)
        self.fails = self.model[self.at]

    def build_model(self) -> nn.Module:
        model = super().build_model()
        return nn.Sequential(*list(model)[: self.at], Fails(), *list(model)[self.at :])


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: ValueError("on purpose"),
    "out of memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "an interrupt": KeyboardInterrupt,
}


@pytest.mark.one_in(4)
@everywhere
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("plain_backward", [False, True])
def test_a_backward_that_fails_half_way_leaves_a_torn_step_that_loading_heals(
    error: Callable[[], BaseException], plain_backward: bool, backward_placement: dict[str, Any], tmp_path: Any
) -> None:
    ours, plain = Breaking(backward_placement, at=6, update_in_backward=True), Breaking(None, at=6)
    assert [ours.step(i) for i in range(2)] == [plain.step(i) for i in range(2)]
    ours.booster.save_model(ours.model, str(tmp_path / "saved"))
    ours.booster.save_optimizer(ours.optimizer, str(tmp_path / "saved"))
    shown = [(state, state["exp_avg"]) for state in ours.optimizer.state.values()]  # held until loading heals
    ours.fails.error = error()
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)) as caught:
        ours.loss(2).backward() if plain_backward else ours.backward(ours.loss(2))
    if not plain_backward and isinstance(caught.value, OutOfMemory):
        assert "of no single step" in str(caught.value) and "untouched" not in str(caught.value)
    torn = r"backward failed in step 3 .*update_in_backward=True.*load a checkpoint.*load_model and booster.load_optim"
    for use in (
        lambda: ours.loss(3),
        lambda: ours.optimizer.step(),
        lambda: ours.model.state_dict(),
        lambda: shown[0][1].sum(),
        lambda: ours.optimizer.state.clear(),
        lambda: ours.booster.save_model(ours.model, str(tmp_path / "other")),
        lambda: ours.optimizer.state_dict(),
        lambda: ours.model.eval()(batch(0)),
    ):
        with pytest.raises(TornStep, match=torn):
            use()
    ours.model.train()
    ours.booster.load_model(ours.model, str(tmp_path / "saved"))
    with pytest.raises(TornStep):
        ours.loss(3)  # the states are torn still
    ours.booster.load_optimizer(ours.optimizer, str(tmp_path / "saved"))
    assert updates_of(ours.model).progress is Progress.WHOLE
    ours.optimizer.zero_grad()
    assert [ours.step(i) for i in range(2, 4)] == [plain.step(i) for i in range(2, 4)]
    check_same(ours, plain)


def test_a_backward_that_fails_before_the_first_update_leaves_everything_whole(
    backward_placement: dict[str, Any],
) -> None:
    ours, plain = Breaking(backward_placement, at=12, update_in_backward=True), Breaking(None, at=12)
    assert ours.step(0) == plain.step(0)
    ours.fails.error = ValueError("on purpose")
    with pytest.raises(ValueError, match="on purpose"):
        ours.backward(ours.loss(1))
    assert [ours.step(i) for i in range(1, 3)] == [plain.step(i) for i in range(1, 3)]
    check_same(ours, plain)
