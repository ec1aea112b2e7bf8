"""Values in the chunk manager, and what it builds."""

from pathlib import Path

import pytest
import torch
from fakes import FakeBackend, FakeUpdate
from manager_rig import FROZEN, NUMEL, TRAINABLE, Rig, plan_of

from gemini.chunk import MASTER, ChunkManager, ChunkState, DiskBackend, Ledger, MemoryMap, TensorSpec, Tier, pack
from gemini.errors import OffloadError, OutOfMemory

NAMES = [MASTER, "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_read_back_as_written_on_every_tier(tier: Tier, name: str, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    homes = {**TRAINABLE, name: tier}
    rig = Rig([homes, homes], room=20, disk=disk)
    for chunk in rig.chunks:
        for parameter in rig.parameters[chunk.index]:
            value = torch.randn(parameter.shape, dtype=torch.float64)
            rig.manager.write(parameter, name, value)
            assert torch.equal(rig.manager.read(parameter, name), value.float())
            copy = rig.manager.read(parameter, name)
            copy.fill_(0)
            assert torch.equal(rig.manager.read(parameter, name), value.float())
    rig.manager.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_value_of_the_wrong_shape_is_refused(tier: Tier, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    rig = Rig([{**TRAINABLE, "exp_avg": tier}], disk=disk)
    before = rig.manager.read(rig.parameters[0][1], "exp_avg")
    longer = torch.ones(100)[:19]  # its storage is long enough
    with pytest.raises(RuntimeError, match=r"20|19"):
        rig.manager.write(rig.parameters[0][1], "exp_avg", longer)
    assert torch.equal(rig.manager.read(rig.parameters[0][1], "exp_avg"), before)
    rig.manager.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_strided_values_keep_their_elements_in_place(tier: Tier, tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    conv = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    layouts = pack([TensorSpec("b", (3,), (1,)), TensorSpec("conv", tuple(conv.shape), conv.stride())], 1000)
    ledger = Ledger({Tier.DEVICE: 10_000, Tier.HOST: 10_000}, MemoryMap.EMULATED)
    plan = plan_of(layouts[0], {**TRAINABLE, MASTER: tier}, torch.float32)
    manager = ChunkManager([plan], ledger, FakeBackend(10_000), disk)
    (chunk,) = manager.chunks
    parameter = torch.nn.Parameter(conv)
    manager.bind(torch.nn.Parameter(torch.zeros(3)), chunk, 0)
    manager.bind(parameter, chunk, 1)
    for value in (conv, conv.contiguous()):
        manager.write(parameter, MASTER, torch.zeros(()).expand(conv.shape))
        manager.write(parameter, MASTER, value)
        assert torch.equal(manager.read(parameter, MASTER), conv)
    manager.fetch(chunk)
    manager.pin(chunk)
    assert parameter.stride() == conv.stride() and torch.equal(parameter, conv)
    manager.close()


def test_writing_a_master_drops_the_full_copy_and_writing_a_moment_does_not() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    rig.manager.write(rig.parameters[0][0], "exp_avg", torch.ones(33))
    assert chunk.state is ChunkState.READY
    rig.manager.write(rig.parameters[0][0], MASTER, torch.ones(33))
    assert chunk.state is ChunkState.HOME
    rig.values[0][0] = torch.ones(33)
    rig.use(chunk)
    assert rig.has_values(chunk)


def test_parameters_are_found_and_strangers_are_not() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    assert rig.manager.find(rig.parameters[1][1]) == (rig.chunks[1], 1)
    assert rig.manager.slot(rig.parameters[1][1]).name == "w3"
    assert rig.manager.find(torch.zeros(3)) is None


# -- building


def test_states_are_fp32_and_everything_else_has_the_compute_dtype() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    trainable, frozen = rig.chunks
    assert {name: home.dtype for name, home in trainable.homes.items()} == dict.fromkeys(NAMES, torch.float32)
    assert trainable.gradient is not None and trainable.gradient.buffer.dtype is torch.bfloat16
    assert frozen.homes[MASTER].dtype is torch.bfloat16 and frozen.gradient is None
    assert list(frozen.homes) == [MASTER]


def test_homes_are_counted_and_the_full_copies_are_not_until_they_are_fetched() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    assert rig.ledger.used(Tier.HOST) == NUMEL * (3 * 4 + 2) + NUMEL * 2
    assert rig.ledger.used(Tier.DEVICE) == 0


def test_a_home_without_room_names_the_buffer_and_a_parameter() -> None:
    layouts = pack([TensorSpec("layers.0.weight", (64,), (1,))], 64)
    plan = plan_of(layouts[0], TRAINABLE, torch.bfloat16)
    with pytest.raises(OutOfMemory, match=r"exp_avg_sq of chunk 0 \(with layers.0.weight\)"):
        ChunkManager([plan], Ledger({Tier.HOST: 64 * 8 + 100}, MemoryMap.EMULATED), FakeBackend(0), None)


def test_closing_ends_the_device_and_the_disk(tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    rig = Rig([{MASTER: Tier.DISK}], disk=disk)
    rig.manager.close()
    assert rig.device.log[-1] == ("close",)
    with pytest.raises(OffloadError):
        rig.manager.read(rig.parameters[0][0], MASTER)


def test_a_change_in_place_goes_home_after_the_update_before_it_was_repeated() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.manager.fetch(chunk)
    rig.manager.pin(chunk)
    parameter = rig.parameters[0][0]
    with torch.no_grad():
        parameter[3] = 7.0
    update = FakeUpdate()
    update.error = OffloadError(5, "the disk is away")
    chunk.begin_update(update, ())
    for _ in range(2):
        with pytest.raises(OffloadError, match="the disk is away"):
            rig.manager.quiet(chunk)
    update.error = None
    rig.manager.quiet(chunk)
    assert float(rig.manager.read(parameter, MASTER)[3]) == 7.0
    chunk.unpin()
    rig.manager.close()
