"""The backend of accelerators: its order of moves on a device whose streams run in any order that marks allow."""

import random
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_accelerator import FakeAccelerator
from fakes import FakeUpdate
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_rig import plan_of

from gemini.chunk import (
    GRADIENT,
    MASTER,
    SHADOW,
    AcceleratorBackend,
    Buffer,
    ChunkPlan,
    DiskBackend,
    Ledger,
    MemoryBuffer,
    MemoryMap,
    Staging,
    Tier,
    accelerator,
)
from gemini.chunk.conversion import conversion_pieces
from gemini.chunk.layout import ChunkLayout, Slot
from gemini.chunk.manager import ChunkManager
from gemini.chunk.memory import Transfer

NUMEL = 100


class Rig:
    """A backend on the imitation, and what the compute stream saw."""

    def __init__(self, seed: int, pin: bool = True) -> None:
        self.device = FakeAccelerator(seed)
        self.backend = AcceleratorBackend(self.device, Staging(2, 32), pin)  # type: ignore[arg-type]
        self.checks: list[tuple[torch.Tensor, float]] = []

    def home(self, dtype: torch.dtype) -> MemoryBuffer:
        home = self.backend.home(Tier.HOST, NUMEL, dtype)
        assert home.tensor is not None
        self.device.hosts.add(home.tensor.untyped_storage().data_ptr())
        return home

    def use(self, full: torch.Tensor, expected: float) -> None:
        """Let the compute stream read a full copy."""
        self.device.compute.put(lambda: self.checks.append((full.clone(), expected)))

    def close(self) -> None:
        self.device.drain()
        self.backend.close()
        for seen, expected in self.checks:
            assert torch.equal(seen, torch.full((NUMEL,), expected, dtype=seen.dtype))


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_unit_reads_what_was_at_home_whatever_the_streams_do_first(seed: int, dtype: torch.dtype) -> None:
    rig, rng = Rig(seed), random.Random(seed)
    homes = [rig.home(dtype) for _ in range(3)]
    fulls = [torch.empty(NUMEL, dtype=torch.bfloat16) for _ in homes]
    values = [0.0] * 3
    arriving: dict[int, Transfer] = {}
    for _ in range(30):
        i = rng.randrange(3)
        if i not in arriving:
            value = float(rng.randrange(100))
            if rng.random() < 0.5:
                # The update of the last step, under way or over. It may begin: nothing reads the old value any more.
                update = FakeUpdate(
                    lambda i=i, value=value: homes[i].write(0, torch.full((NUMEL,), value, dtype=dtype))
                )
                rig.device.drain()
                values[i] = value
                if rng.random() < 0.5:
                    update.wait()
            else:
                update = None
            rig.backend.grow(fulls[i])
            arriving[i] = rig.backend.upload(fulls[i], homes[i], update, background=rng.random() < 0.5)
        elif rng.random() < 0.6:
            arriving[i].wait()
            rig.use(fulls[i], values[i])
        else:
            arriving.pop(i).wait()
            rig.backend.shrink(fulls[i])
    rig.close()


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 40))
def test_gradients_arrive_and_add_up_in_order_although_their_memory_is_used_again(seed: int) -> None:
    rig, rng = Rig(seed), random.Random(seed)
    homes = [rig.home(torch.bfloat16) for _ in range(3)]
    expected: list[torch.Tensor | None] = [None] * 3
    for _ in range(20):
        i = rng.randrange(3)
        value = torch.randn(NUMEL).bfloat16()
        memory = torch.empty(NUMEL, dtype=torch.bfloat16)
        gradient = memory[:]
        rig.device.compute.put(lambda memory=memory, value=value: memory.copy_(value))
        into = homes[i].tensor
        assert into is not None
        before = expected[i]
        rig.backend.download(gradient, into, accumulate=before is not None)
        expected[i] = value if before is None else before + value
        # When the last reference goes, the allocator gives the memory to whatever the compute stream does next.
        weakref.finalize(gradient, rig.device.spoil, memory)
        del gradient
        if rng.random() < 0.2:
            rig.backend.synchronize()
            for home, value_there in zip(homes, expected, strict=True):
                assert value_there is None or torch.equal(home.tensor, value_there)  # type: ignore[arg-type]
    rig.close()


def test_a_gradient_is_kept_until_it_has_left_and_no_longer() -> None:
    rig = Rig(0)
    home, gradient = rig.home(torch.bfloat16), torch.ones(NUMEL, dtype=torch.bfloat16)
    assert home.tensor is not None
    rig.backend.download(gradient, home.tensor, accumulate=False)
    kept = [tensor for _, tensors in rig.backend._leaving for tensor in tensors]
    assert any(tensor is gradient for tensor in kept)
    rig.device.drain()
    rig.backend.download(torch.ones(NUMEL, dtype=torch.bfloat16), home.tensor, accumulate=True)
    assert [len(rig.backend._leaving)] == [1]
    rig.backend.synchronize()
    assert not rig.backend._leaving and home.tensor.eq(2).all()
    rig.close()


def test_the_room_of_a_home_is_used_again_only_when_its_moves_are_over() -> None:
    for seed in range(10):
        rig = Rig(seed)
        home, full = rig.home(torch.float32), torch.empty(NUMEL, dtype=torch.bfloat16)
        home.write(0, torch.full((NUMEL,), 3.0))
        rig.backend.grow(full)
        transfer = rig.backend.upload(full, home, None, background=True)
        rig.backend.release(home)
        rig.home(torch.float32).write(0, torch.full((NUMEL,), 5.0))
        transfer.wait()
        rig.device.drain()
        assert full.eq(3.0).all()
        rig.close()


@pytest.mark.timeout(60)
def test_a_fetch_behind_a_pending_update_does_not_stop_the_caller() -> None:
    rig = Rig(0)
    home, full = rig.home(torch.float32), torch.empty(NUMEL, dtype=torch.bfloat16)
    may_go_on = threading.Event()

    def work() -> None:
        assert may_go_on.wait(30)
        home.write(0, torch.full((NUMEL,), 5.0))

    rig.backend.grow(full)
    transfer = rig.backend.upload(full, home, FakeUpdate(work), background=True)
    assert not transfer.done()
    may_go_on.set()
    transfer.wait()
    rig.use(full, 5.0)
    rig.close()


def test_a_prefetch_does_not_stop_the_cpu_and_holds_compute_only_where_it_is_used() -> None:
    rig = Rig(0)
    home, full = rig.home(torch.bfloat16), torch.empty(NUMEL, dtype=torch.bfloat16)
    home.write(0, torch.ones(NUMEL, dtype=torch.bfloat16))
    done_before = rig.device.compute.done
    rig.backend.grow(full)
    transfer = rig.backend.upload(full, home, None, background=True)
    other = rig.device.compute.mark()
    assert not transfer.done() and rig.device.compute.done == done_before
    rig.device.run_until(other)  # what does not use it goes on
    transfer.wait()
    assert not transfer.done() and rig.backend._to_device.done == 0  # type: ignore[attr-defined]
    rig.use(full, 1.0)
    rig.close()
    assert transfer.done()


def test_a_master_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = partial(conversion_pieces, longest=32, scratch=4)
    monkeypatch.setattr(accelerator, "conversion_pieces", pieces)
    rig = Rig(3)
    home, full = rig.home(torch.float32), torch.empty(NUMEL, dtype=torch.bfloat16)
    value = torch.randn(NUMEL)
    home.write(0, value)
    rig.backend.grow(full)
    rig.backend.upload(full, home, None, background=False).wait()
    rig.device.drain()
    assert torch.equal(full, value.bfloat16())
    assert len(list(pieces(NUMEL, 2))) > 4


@pytest.mark.timeout(60)
def test_a_home_on_disk_arrives_behind_what_used_its_memory_before(tmp_path: Path) -> None:
    rig = Rig(1)
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    home: Buffer = disk.allocate(NUMEL, torch.float32, "a home")
    home.write(0, torch.full((NUMEL,), 7.0))
    full = torch.empty(NUMEL, dtype=torch.bfloat16)
    rig.backend.grow(full)
    rig.backend.upload(full, home, None, background=True).wait()
    rig.use(full, 7.0)
    rig.close()
    disk.close()


# -- one block for all homes on HOST


def plans() -> list[ChunkPlan]:
    buffers: dict[str, Tier] = dict.fromkeys((MASTER, "exp_avg", "exp_avg_sq", GRADIENT), Tier.HOST)
    return [
        plan_of(
            ChunkLayout(i, 128, (Slot(i, f"p{i}", 0, NUMEL, (NUMEL,), (1,)),)),
            {**buffers, SHADOW: Tier.HOST} if i else dict.fromkeys(buffers, Tier.DEVICE),
            torch.bfloat16,
        )
        for i in range(4)
    ]


@pytest.mark.parametrize("pin", [True, False])
def test_all_homes_of_a_model_on_host_share_one_block(pin: bool) -> None:
    device = FakeAccelerator(0)
    backend = AcceleratorBackend(device, None, pin)  # type: ignore[arg-type]
    manager = ChunkManager(
        plans(), Ledger({Tier.DEVICE: 1 << 20, Tier.HOST: 1 << 20}, MemoryMap.EMULATED), backend, None
    )
    assert device.host_blocks == [pin]
    tensors = [h.tensor for c in manager.chunks for h in c.homes.values() if h.tier is Tier.HOST]
    tensors += [c.gradient.buffer.tensor for c in manager.chunks if c.gradient and c.gradient.buffer.tier is Tier.HOST]
    assert len(tensors) == 3 * 5
    assert len({t.untyped_storage().data_ptr() for t in tensors if t is not None}) == 1
    manager.close()


def test_the_room_of_a_shadow_is_counted() -> None:
    ledger = Ledger({Tier.DEVICE: 1 << 20, Tier.HOST: 1 << 20}, MemoryMap.EMULATED)
    manager = ChunkManager(plans(), ledger, AcceleratorBackend(FakeAccelerator(0), None, False), None)  # type: ignore[arg-type]
    assert ledger.used(Tier.HOST) == 3 * 128 * (4 + 4 + 4 + 2 + 2)
    manager.close()


# -- the imitation itself


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda backend: setattr(backend._to_device, "follow_current", lambda: None), id="upload"),
        pytest.param(lambda backend: setattr(backend._to_host, "follow_current", lambda: None), id="download"),
    ],
)
def test_the_imitation_notices_a_move_that_does_not_follow_the_compute_stream(
    broken: Callable[[AcceleratorBackend], None],
) -> None:
    noticed = 0
    for seed in range(30):
        rig = Rig(seed)
        broken(rig.backend)
        home, full = rig.home(torch.bfloat16), torch.empty(NUMEL, dtype=torch.bfloat16)
        rig.backend.grow(full)
        rig.backend.upload(full, home, None, background=True).wait()
        rig.use(full, 0.0)
        gradient = torch.empty(NUMEL, dtype=torch.bfloat16)
        rig.device.compute.put(lambda gradient=gradient: gradient.fill_(1.0))
        rig.backend.download(gradient, home.tensor, accumulate=False)  # type: ignore[arg-type]
        rig.backend.synchronize()
        right = torch.equal(home.tensor, torch.ones(NUMEL, dtype=torch.bfloat16))  # type: ignore[arg-type]
        rig.device.drain()
        noticed += not right or not torch.equal(rig.checks[0][0], torch.zeros(NUMEL, dtype=torch.bfloat16))
        rig.checks.clear()
        rig.close()
    assert noticed > 5
