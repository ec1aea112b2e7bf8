"""The simulated device itself: what it computes is right, and what is asked of it too early is wrong."""

import ctypes
import os
import signal
from collections.abc import Callable

import pytest
import torch
from simulated import SimulatedDevice
from torch import Tensor, nn

pytestmark = pytest.mark.own_process()

SEEDS = 100


def test_kernels_run_when_somebody_waits_and_not_before(device: SimulatedDevice) -> None:
    device.seed(0, eager=0.0)
    torch.accelerator.synchronize()
    x = torch.ones(4, device="sim") * 2
    assert device.pending > 0
    assert x.sum().item() == 8
    torch.accelerator.synchronize()
    assert device.pending == 0


def test_memory_is_nan_until_it_is_written(device: SimulatedDevice) -> None:
    assert torch.empty(100, device="sim").isnan().all()
    assert torch.empty(100, dtype=torch.bfloat16, device="sim").isnan().all()


def test_the_host_cannot_touch_device_memory(device: SimulatedDevice) -> None:
    address = torch.ones(4, device="sim").data_ptr()
    child = os.fork()
    if child == 0:
        os.close(2)  # the fault handler's report is no news
        ctypes.cast(address, ctypes.POINTER(ctypes.c_float))[0]
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV


def test_the_capacity_is_never_exceeded(device: SimulatedDevice) -> None:
    before = torch.accelerator.memory_allocated()
    device.set_capacity(before + (1 << 20))
    torch.accelerator.reset_peak_memory_stats()
    kept = torch.empty(1 << 19, dtype=torch.uint8, device="sim")
    with pytest.raises(torch.OutOfMemoryError, match=f"capacity {before + (1 << 20)}"):
        torch.empty((1 << 19) + 1, dtype=torch.uint8, device="sim")
    del kept
    torch.empty(1 << 20, dtype=torch.uint8, device="sim")  # what was kept for reuse is given back
    assert torch.accelerator.memory_allocated() == before
    assert torch.accelerator.max_memory_reserved() <= before + (1 << 20)


def test_memory_that_is_freed_goes_to_the_next_allocation_of_its_stream(device: SimulatedDevice) -> None:
    def fresh() -> int:
        return torch.empty(1000, device="sim").data_ptr()

    side = torch.Stream("sim")
    with side:
        on_side = fresh()
        assert fresh() == on_side
    assert fresh() != on_side
    with side:
        assert fresh() == on_side


def test_memory_that_another_stream_uses_is_kept_if_it_is_told(device: SimulatedDevice) -> None:
    for seed in range(SEEDS):
        device.seed(seed)
        x, side = torch.ones(1000, device="sim"), torch.Stream("sim")
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            total = x.sum()
        x.record_stream(side)
        del x
        torch.full((1000,), 5.0, device="sim")
        torch.accelerator.synchronize()
        assert total.item() == 1000


def copied_up(wait: bool) -> bool:
    host, into = torch.full((100,), 5.0, pin_memory=True), torch.zeros(100, device="sim")
    torch.accelerator.synchronize()
    side = torch.Stream("sim")
    with side:
        into.copy_(host, non_blocking=True)
        event = torch.Event("sim")
        event.record()
    if wait:
        torch.accelerator.current_stream().wait_event(event)
    return bool((into * 2 == 10).all())


def copied_down(wait: bool) -> bool:
    host, source = torch.zeros(100, pin_memory=True), torch.full((100,), 5.0, device="sim")
    host.copy_(source, non_blocking=True)
    if wait:
        torch.accelerator.synchronize()
    return bool((host == 5).all())


def changed_behind_a_copy(wait: bool) -> bool:
    host, into = torch.full((100,), 5.0, pin_memory=True), torch.zeros(100, device="sim")
    into.copy_(host, non_blocking=True)
    if wait:
        torch.accelerator.synchronize()
    host.fill_(1.0)
    return bool((into == 5).all())


def freed_under_another_stream(wait: bool) -> bool:
    x, side = torch.ones(1000, device="sim"), torch.Stream("sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        total = x.sum()
    if wait:
        torch.accelerator.current_stream().wait_stream(side)
    del x
    torch.full((1000,), 5.0, device="sim")
    torch.accelerator.synchronize()
    return total.item() == 1000


@pytest.mark.parametrize(
    "use", [copied_up, copied_down, changed_behind_a_copy, freed_under_another_stream], ids=lambda use: use.__name__
)
def test_a_missing_wait_is_wrong_numbers(device: SimulatedDevice, use: Callable[[bool], bool]) -> None:
    right = {True: 0, False: 0}
    for wait in right:
        for seed in range(SEEDS):
            device.seed(seed)
            right[wait] += use(wait)
    assert right[True] == SEEDS and right[False] < SEEDS - 3


def test_the_same_seed_gives_the_same_order(device: SimulatedDevice) -> None:
    def outcomes() -> list[bool]:
        return [(device.seed(seed), copied_up(False))[1] for seed in range(30)]  # type: ignore[func-returns-value]

    assert outcomes() == outcomes()


def test_a_kernel_that_fails_is_told_at_the_next_wait(device: SimulatedDevice) -> None:
    x = torch.zeros(3, device="sim")
    x.index_add_(0, torch.tensor([7], device="sim"), torch.ones(1, device="sim"))
    with pytest.raises(RuntimeError, match="a kernel failed earlier"):
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()


def test_tensors_of_two_devices_are_refused(device: SimulatedDevice) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(3, device="sim") + torch.ones(3)
    assert (torch.ones(3, device="sim") + torch.tensor(1.0)).cpu().eq(2).all()


def test_views_of_a_storage_see_it_go_and_come(device: SimulatedDevice) -> None:
    x = torch.zeros(10, device="sim")
    part = x[2:4]
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(40)
    assert part.isnan().all()
    x.fill_(3)
    assert part.eq(3).all()


def small() -> nn.Module:
    layers = [nn.Embedding(20, 16), nn.Conv1d(6, 6, 3), nn.GELU(), nn.LayerNorm(14), nn.Dropout(0.3), nn.Linear(14, 8)]
    return nn.Sequential(*layers)


def trained(place: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    model = small().to(dtype).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        x = torch.randint(0, 20, (4, 6)).to(place)
        model(x).float().square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_as_on_the_cpu(device: SimulatedDevice, dtype: torch.dtype) -> None:
    for ours, theirs in zip(trained("sim", dtype), trained("cpu", dtype), strict=True):
        assert torch.equal(ours, theirs)
