"""Materialisation streams: one value at a time, whatever the order of initialisation."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize

ROOT = Path(__file__).resolve().parents[2]


class Discard:
    """A sink that keeps nothing, and counts the values alive whenever it is called."""

    def __init__(self) -> None:
        self.alive = weakref.WeakSet()
        self.peak = 0
        self.calls = 0
        self.sums = {}

    def __call__(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        assert is_lazy(parameter) and not is_lazy(value) and isinstance(parameter, nn.Parameter)
        assert parameter.shape == value.shape and parameter.dtype == value.dtype
        storage = value.untyped_storage()
        self.alive.add(storage)
        self.peak = max(self.peak, len(self.alive))
        self.calls += 1
        return torch.full((), float("nan"), dtype=value.dtype).expand(value.shape)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=3, n_head=2, vocab_size=50, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def rescaled() -> nn.Module:
    """Initialised layer by layer, then gone over again, as BEiT and DeepNorm do."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    for i, layer in enumerate(net):
        layer.weight.data.div_(i + 2.0)
    return net


def cast() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).to(torch.bfloat16)


@pytest.mark.parametrize("build", [gpt2, rescaled, cast])
def test_at_most_two_values_are_alive_at_a_time(build):
    with LazyInitContext():
        model = build()
    sink = Discard()
    materialize(model, sink)
    assert sink.calls == len(list(model.parameters()))
    assert sink.peak <= 2
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter and parameter.isnan().all()
    assert not any(is_lazy(buffer) for buffer in model.buffers())


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Sums the storages that ops have made and that still exist, temporaries included."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("build", [gpt2, rescaled, cast])
def test_all_tensors_of_a_replay_together_stay_near_the_largest_one(build):
    with LazyInitContext():
        model = build()
    largest = max(p.numel() * 4 for p in model.parameters())
    total = sum(p.numel() * 4 for p in model.parameters())
    fixed = sum(b.numel() * b.element_size() for b in model.buffers())
    with LiveBytes() as live:
        materialize(model, lambda parameter, value: torch.zeros((), dtype=value.dtype).expand(value.shape))
    assert live.peak <= 2 * largest + fixed + 16384  # copies of the generator state are 5 kB each
    assert live.peak < total / 2


CHILD = r"""
import sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from gemini.lazy import LazyInitContext, materialize
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))  # imports and first-use costs
with LazyInitContext():
    warm = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
materialize(warm)
config = GPT2Config(n_embd=704, n_layer=11, n_head=11)
before = status("VmRSS:")
with LazyInitContext():
    model = GPT2LMHeadModel(config)
recorded = status("VmRSS:")
numel = sum(p.numel() for p in model.parameters())
largest = max(p.numel() * 4 for p in model.parameters())
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
start = status("VmRSS:")
seen = []
def sink(parameter, value):
    seen.append(value.numel())
    return torch.zeros((), dtype=value.dtype).expand(value.shape)
materialize(model, sink)
assert sum(seen) == numel
print(numel, largest, recorded - before, status("VmHWM:") - start)
"""


@pytest.mark.heavy  # test_sharding.py and test_pretrained.py hold the peak of smaller models to closer bounds
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak RSS")
def test_peak_memory_of_a_hundred_million_parameters_is_about_the_largest_tensor():
    pytest.importorskip("transformers")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD], cwd=ROOT, capture_output=True, text=True, timeout=80, check=False
    )
    assert child.returncode == 0, child.stderr
    numel, largest, recording, growth = map(int, child.stdout.split())
    print(f"{numel / 1e6:.0f}M parameters, largest {largest >> 20} MiB, "
          f"context +{recording >> 20} MiB, materialise +{growth >> 20} MiB")  # fmt: skip
    assert numel > 95e6
    assert recording < 50 << 20
    assert growth < largest + (200 << 20)


def test_values_handed_to_the_sink_are_the_eager_ones():
    torch.manual_seed(0)
    eager = gpt2()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = gpt2()
    flat = torch.zeros(sum(p.numel() for p in lazy.parameters()))
    offset = 0

    def sink(parameter, value):
        nonlocal offset
        view = flat[offset : offset + value.numel()].view(value.shape)
        offset += value.numel()
        return view.copy_(value)

    materialize(lazy, sink)
    assert offset == flat.numel()
    for (name, a), (_, b) in zip(eager.named_parameters(), lazy.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_the_sink_may_change_the_dtype_but_not_the_shape():
    with LazyInitContext():
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        materialize(model, lambda parameter, value: torch.zeros(1))
    materialize(model, lambda parameter, value: value.to(torch.bfloat16))
    assert model.weight.dtype == torch.bfloat16 and model.weight.requires_grad


def test_parameters_on_one_storage_reach_the_sink_one_after_the_other():
    with LazyInitContext():
        a, b, c = (nn.Linear(3, 3, bias=False) for _ in range(3))
        c.weight.data = a.weight.data
        model = nn.ModuleList([a, b, c])
    assert a.weight.untyped_storage()._cdata == c.weight.untyped_storage()._cdata
    assert a.weight.untyped_storage()._cdata != b.weight.untyped_storage()._cdata
    order = []
    materialize(model, lambda p, value: (order.append((id(p), value.data_ptr())), value)[1])
    mine = [i for i, (key, _) in enumerate(order) if key in (id(a.weight), id(c.weight))]
    assert mine[1] == mine[0] + 1
    assert order[mine[0]][1] == order[mine[1]][1]


def test_a_failing_sink_leaves_a_model_that_can_be_materialised_again():
    torch.manual_seed(0)
    eager = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    state = torch.get_rng_state()
    calls = 0

    def sink(parameter, value):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("disk full")
        return value

    with pytest.raises(OSError, match="disk full"):
        materialize(lazy, sink)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(is_lazy(p) for p in lazy.parameters()) == 4
    materialize(lazy, sink)
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), lazy.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), after)


def test_a_lazy_model_that_is_dropped_takes_its_tape_with_it():
    with LazyInitContext():
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    tape = weakref.ref(model.layers[0].norm1.weight._lazy.tape)
    del model
    gc.collect()
    assert tape() is None


def test_a_materialised_model_holds_no_tape():
    with LazyInitContext():
        model = nn.Linear(3, 3)
    tape = weakref.ref(model.weight._lazy.tape)
    materialize(model)
    gc.collect()
    assert tape() is None and "_lazy" not in vars(model.weight)
