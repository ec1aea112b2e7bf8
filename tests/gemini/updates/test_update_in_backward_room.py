"""With ``update_in_backward=True`` gradients never are there all at once: the room for a few, and how it grows."""

from typing import Any

import pytest
import torch
from backward_runs import STEPS, Run, in_backward
from loop import SMALL, WIDTH, batch
from parity import Task, check_equal, run_managed, run_plain
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import OutOfMemory

pytestmark = pytest.mark.timeout(60)


def test_gradients_are_there_for_a_few_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = {"device_memory": "36KiB", **SMALL}
    ours = in_backward(placement)
    manager = boosted(ours.model).manager
    all_bytes = sum(chunk.layout.numel * 4 for chunk in manager.chunks)
    assert 0 < manager.gradient_pool.nbytes_on(Tier.HOST) < all_bytes / 2
    assert ours.model.memory_stats()["model_data/gradient_bytes"] == manager.gradient_pool.nbytes
    before = manager.ledger.used(Tier.HOST)
    ours.step(0)
    manager.settle()
    assert manager.ledger.used(Tier.HOST) == before  # and did not have to grow
    assert manager.gradient_pool.growths == 0


def test_a_smaller_capacity_is_enough() -> None:
    """Without a home for every gradient, the same model fits less memory."""

    def least(**plugin: Any) -> int:
        low, high = 0, 1 << 20
        while high - low > 1024:
            middle = (low + high) // 2
            try:
                Run({"host_memory": middle, **SMALL}, "bf16", **plugin).step(0)
                high = middle
            except OutOfMemory:
                low = middle
        return high

    normal, ours = least(), least(update_in_backward=True)
    numel = sum(p.numel() for p in Run(None).model.parameters())
    assert normal - ours > numel  # half of the two bytes a parameter


class Later(nn.Module):
    """Runs its layers in another order than it has them, so that the guess of the room is too low."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for i in (*range(0, 12, 2), *range(1, 12, 2)):
            x = torch.tanh(self.layers[i](x))
        return x


def later() -> Task:
    return Task(Later, [batch(i) for i in range(STEPS)], lambda model, x: model(x).square().mean())


@pytest.mark.parametrize("has_disk", [False, True])
def test_a_guess_that_was_too_low_grows_or_goes_to_disk(has_disk: bool, tmp_path: Any) -> None:
    two_each = {"chunk_config_dict": {1: {"chunk_size": 2 * WIDTH * WIDTH}}}  # of neighbours that run far apart
    placement: dict[str, Any] = {"offload_dir": tmp_path, "host_memory": "560KiB"} if has_disk else {}
    run, model = run_managed(later(), update_in_backward=True, **two_each, **placement)
    check_equal(run, run_plain(later()))
    assert boosted(model).manager.gradient_pool.growths > 0


def test_where_there_is_no_room_to_grow_the_message_says_how_much_is_enough() -> None:
    two_each = {"chunk_config_dict": {1: {"chunk_size": 2 * WIDTH * WIDTH}}}
    capacity = 500 << 10
    for _ in range(20):
        try:
            run, _ = run_managed(later(), update_in_backward=True, host_memory=capacity, **two_each)
            break
        except OutOfMemory as error:
            text = str(error)
            assert "host_memory to " in text, text
            enough = int(text.split("host_memory to ")[1].split()[0])
            assert enough > capacity
            capacity = enough
    check_equal(run, run_plain(later()))
