"""Gradients in chunks are what ``p.grad`` would be, bit for bit, wherever they live."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import FakeBackend
from torch import Tensor, nn

from gemini.chunk import DiskBackend, GradientBuffer, Ledger, MemoryMap, RamBackend, Staging, TensorSpec, Tier, pack

SHAPES = [(33,), (2, 3, 4, 5), (), (7, 9), (0, 4)]
STRIDES = [(1,), (60, 1, 15, 3), (), (9, 1), (4, 1)]  # the second is channels_last
(LAYOUT,) = pack([TensorSpec(f"w{i}", *spec) for i, spec in enumerate(zip(SHAPES, STRIDES, strict=True))], 1000)


@pytest.fixture(params=[Tier.HOST, Tier.DISK], ids=["ram", "disk"])
def tier(request: pytest.FixtureRequest) -> Tier:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def buffer(tier: Tier, dtype: torch.dtype, tmp_path: Path) -> Iterator[GradientBuffer]:
    device = RamBackend(None, Staging(2, 16))
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    home = disk.allocate(LAYOUT.numel, dtype, "x") if tier is Tier.DISK else device.home(tier, LAYOUT.numel, dtype)
    home.write(0, torch.full((LAYOUT.numel,), float("nan"), dtype=dtype))  # nobody may read what was not written
    yield GradientBuffer(LAYOUT, home, device)
    device.close()
    disk.close()


def gradient(position: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(SHAPES[position], generator=generator).to(dtype)
    return value.to(memory_format=torch.channels_last) if position == 1 else value


def test_gradients_are_read_back_in_their_shape_and_strides(buffer: GradientBuffer, dtype: torch.dtype) -> None:
    for position in range(len(SHAPES)):
        buffer.add(position, gradient(position, dtype))
    for position in range(len(SHAPES)):
        got = buffer.read(position)
        assert got.stride() == STRIDES[position] and torch.equal(got, gradient(position, dtype))
    assert buffer.present == set(range(len(SHAPES)))


@pytest.mark.parametrize("position", range(len(SHAPES)))
def test_adding_is_what_autograd_does_to_grad_bit_for_bit(
    buffer: GradientBuffer, dtype: torch.dtype, position: int
) -> None:
    parameter = nn.Parameter(gradient(position, dtype, seed=9))
    for seed in (1, 2, 3):
        (parameter * gradient(position, dtype, seed)).sum().backward()
        buffer.add(position, gradient(position, dtype, seed))
    assert parameter.grad is not None
    assert torch.equal(buffer.read(position), parameter.grad)
    assert buffer.present == {position}


def test_the_order_of_adding_matters_and_is_kept() -> None:
    values = [torch.full((33,), x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0)]
    results = []
    for order in ((0, 1, 2), (1, 2, 0)):
        device = RamBackend(None)
        buffer = GradientBuffer(LAYOUT, device.home(Tier.HOST, LAYOUT.numel, torch.bfloat16), device)
        for i in order:
            buffer.add(0, values[i])
        results.append(buffer.read(0)[0].item())
        device.close()
    assert results == [256.0, 258.0]


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_norms_equal_torchs_in_fp32(buffer: GradientBuffer, dtype: torch.dtype, order: float) -> None:
    for position in (3, 0, 1, 2):
        buffer.add(position, gradient(position, dtype))
    buffer.add(3, gradient(3, dtype, seed=1))
    expected = [gradient(position, dtype) for position in (0, 1, 2)]
    expected.append(gradient(3, dtype) + gradient(3, dtype, seed=1))
    for position, value in enumerate(expected):
        norm = buffer.norm(position, order)
        assert norm.dtype is torch.float32 and norm.device.type == "cpu"
        assert torch.equal(norm, torch.linalg.vector_norm(value, order, dtype=torch.float32))


def test_gradients_with_other_strides_are_put_in_place(buffer: GradientBuffer, dtype: torch.dtype) -> None:
    base = gradient(1, dtype)
    for value in (base.contiguous(), base[:1].expand(2, 3, 4, 5), torch.cat([base, base], 3)[..., ::2]):
        buffer.clear()
        buffer.add(1, value)
        assert torch.equal(buffer.read(1), value)
        buffer.add(1, value)
        assert torch.equal(buffer.read(1), value + value)


def test_a_gradient_that_is_part_of_a_larger_tensor_is_found_at_its_offset(
    buffer: GradientBuffer, dtype: torch.dtype
) -> None:
    larger = torch.randn(100).to(dtype)
    buffer.add(0, larger[10:43])
    assert torch.equal(buffer.read(0), larger[10:43])


def test_a_gradient_that_has_a_graph_leaves_none_in_the_buffer(buffer: GradientBuffer, dtype: torch.dtype) -> None:
    value = gradient(0, dtype).requires_grad_() * 1  # as backward(create_graph=True) delivers it
    for _ in range(2):
        buffer.add(0, value)
    assert not buffer.read(0).requires_grad and torch.equal(buffer.read(0), (value + value).detach())
    assert buffer.buffer.tensor is None or not buffer.buffer.tensor.requires_grad


def test_writing_replaces_and_clearing_forgets(buffer: GradientBuffer, dtype: torch.dtype) -> None:
    buffer.add(0, gradient(0, dtype, 1))
    buffer.write(0, gradient(0, dtype, 2))
    assert torch.equal(buffer.read(0), gradient(0, dtype, 2))
    assert torch.equal(buffer.norm(0), torch.linalg.vector_norm(gradient(0, dtype, 2), dtype=torch.float32))
    buffer.clear()
    assert buffer.present == set()
    buffer.add(0, gradient(0, dtype, 3))
    assert torch.equal(buffer.read(0), gradient(0, dtype, 3))


def test_a_sparse_gradient_names_the_parameter_and_the_remedy(buffer: GradientBuffer) -> None:
    with pytest.raises(TypeError, match=r"w3: got a torch.sparse_coo gradient.*sparse=False"):
        buffer.add(3, torch.zeros(7, 9).to_sparse())
    assert buffer.present == set()


def test_what_is_on_its_way_to_disk_has_arrived_before_it_is_read_or_added_to(tmp_path: Path) -> None:
    device = FakeBackend(1 << 20)
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    buffer = GradientBuffer(LAYOUT, disk.allocate(LAYOUT.numel, torch.float32, "x"), device)
    at = LAYOUT.slots[3].offset
    buffer.add(3, gradient(3, torch.float32))
    assert device.log == [("store", at)]
    buffer.add(3, gradient(3, torch.float32))
    assert device.log[1:] == [("synchronize",), ("store", at)]
    buffer.read(3)
    assert device.log[3:] == [("synchronize",)]
    disk.close()


def test_norms_are_computed_on_the_way_once_someone_has_asked_for_them(tmp_path: Path) -> None:
    device = FakeBackend(1 << 20)
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    buffer = GradientBuffer(LAYOUT, disk.allocate(LAYOUT.numel, torch.float32, "x"), device)
    for round_ in range(3):
        buffer.add(0, gradient(0, torch.float32, seed=round_))
        before = disk.read_bytes
        norm = buffer.norm(0)
        assert torch.equal(norm, torch.linalg.vector_norm(gradient(0, torch.float32, seed=round_)))
        assert (disk.read_bytes > before) == (round_ == 0)
        buffer.clear()
    disk.close()
