"""Codecs: how values lie in the buffers of a chunk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FakeBackend
from manager_rig import TRAINABLE, plan_of

from gemini.chunk import (
    ABSMAX,
    FORMATS,
    GRADIENT,
    MASTER,
    BlockFormat,
    BufferSpec,
    ChunkManager,
    ChunkPlan,
    Codec,
    DiskBackend,
    Ledger,
    Marked,
    MemoryMap,
    Plain,
    Quantised,
    RamBackend,
    SplitBf16,
    Staging,
    TensorSpec,
    Tier,
    WithShadow,
    dequantise,
    pack,
    quantise,
    values,
)

STATE = BufferSpec("exp_avg_sq", has_spare_sign=True)
CODECS: list[Codec] = [
    Plain(BufferSpec(MASTER)),
    WithShadow(BufferSpec(MASTER), torch.bfloat16),
    SplitBf16(STATE.name),
    Marked(STATE),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_what_is_decoded_is_what_was_encoded(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator)
    before = {spec.name: torch.zeros(1000, dtype=spec.dtype) for spec in (*codec.specs, STATE)}
    after = {**before, **codec.encode(values, before)}
    assert torch.equal(codec.decode(after), values) and codec.dtype is torch.float32
    assert {name: stored.dtype for name, stored in after.items()} == {n: stored.dtype for n, stored in before.items()}


def test_a_value_that_a_block_of_elements_shares_begins_with_the_block() -> None:
    scale = BufferSpec("scale", torch.float32, 256)
    assert (scale.numel(257), scale.nbytes(256), scale.part(256, 600)) == (2, 4, slice(1, 3))


def test_an_optimizer_may_keep_any_number_of_states() -> None:
    (layout,) = pack([TensorSpec("w", (33,), (1,)), TensorSpec("b", (5,), (1,))], 100)
    states = tuple(BufferSpec(f"state_of_{i}") for i in range(9))
    tiers = {**dict.fromkeys((MASTER, GRADIENT), Tier.HOST), **{spec.name: Tier.HOST for spec in states}}
    ledger = Ledger({Tier.DEVICE: 1 << 20, Tier.HOST: 1 << 20}, MemoryMap.EMULATED)
    manager = ChunkManager([plan_of(layout, tiers, torch.bfloat16, states)], ledger, FakeBackend(1 << 20), None)
    parameter = torch.empty(33, dtype=torch.bfloat16)
    manager.bind(parameter, manager.chunks[0], 0)
    for i, spec in enumerate(states):
        manager.write(parameter, spec.name, torch.full((33,), float(i)))
    for i, spec in enumerate(states):
        assert torch.equal(manager.read(parameter, spec.name), torch.full((33,), float(i)))


def test_a_plan_has_a_place_for_each_of_its_buffers() -> None:
    (layout,) = pack([TensorSpec("w", (33,), (1,))], 100)
    plan = plan_of(layout, TRAINABLE, torch.bfloat16)
    with pytest.raises(ValueError, match="chunk 0 has buffers master, exp_avg, exp_avg_sq, gradient and places for "):
        replace(plan, tiers={MASTER: Tier.HOST, GRADIENT: Tier.HOST})


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("piece_numel", [64, 1 << 20])
def test_another_form_of_parameters_is_one_more_codec(
    tier: Tier, piece_numel: int, form: BlockFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_PIECE_NUMEL", piece_numel)
    tensors = [TensorSpec("w", (15, 7), (7, 1), align_numel=64), TensorSpec("b", (50,), (1,), align_numel=64)]
    (layout,) = pack(tensors, 1000)
    codec = Quantised(form, torch.bfloat16)
    ledger = Ledger(dict.fromkeys(Tier, 1 << 20), MemoryMap.EMULATED)
    disk = DiskBackend(tmp_path, ledger) if tier is Tier.DISK else None
    device = RamBackend(Staging(2, 4096) if disk is not None else None)
    plan = ChunkPlan(layout, codec, (), dict.fromkeys((MASTER, ABSMAX), tier), torch.bfloat16)
    manager = ChunkManager([plan], ledger, device, disk)
    (chunk,) = manager.chunks
    for position, slot in enumerate(layout.slots):
        value = torch.randn(slot.shape, generator=torch.Generator().manual_seed(position))
        parameter = torch.empty(slot.shape, dtype=torch.bfloat16)
        manager.bind(parameter, chunk, position)
        manager.write(parameter, MASTER, value)
        codes, absmax = quantise(value.flatten().bfloat16(), form)
        expected = dequantise(codes, absmax, form, torch.bfloat16)[: slot.numel].view(slot.shape)
        assert torch.equal(manager.read(parameter, MASTER), expected)
        manager.fetch(chunk)
        manager.pin(chunk)
        assert torch.equal(parameter, expected)
        chunk.unpin()
        manager.evict(chunk)
    manager.close()
