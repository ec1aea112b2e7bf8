"""Lazy models straight into DTensor shards: two processes over gloo, the parts put together equal the eager model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="process groups over gloo on the loopback interface are tried on Linux only"
)

PRELUDE = r"""
import datetime, sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from gemini.lazy import LazyInitContext, is_lazy, materialize
torch.set_num_threads(1)
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
)
mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))

def raises(error, words, call):
    try:
        call()
    except error as caught:
        assert words in str(caught), str(caught)
    else:
        raise AssertionError(f"{words}: not raised")

def lazily(build, seed=0):
    torch.manual_seed(seed)
    with LazyInitContext():
        return build()

def eagerly(build):
    torch.manual_seed(0)
    return build(), torch.get_rng_state()
"""

CORRECTNESS = r"""
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 6), nn.LSTM(6, 5), nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(3))
        self.kept = [self.body.weight_hh_l0, {"tuple": (self.head.bias,)}]
        nn.init.normal_(self.head.weight)

def compare(eager, state, lazy):
    assert torch.equal(torch.get_rng_state(), state)
    expected, got = dict(eager.named_parameters()), dict(lazy.named_parameters())
    assert list(expected) == list(got)
    for name, parameter in got.items():
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad == expected[name].requires_grad, name
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(whole, expected[name]), name
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            assert local.untyped_storage().nbytes() == local.numel() * local.element_size(), name
    for (name, a), (_, b) in zip(eager.named_buffers(), lazy.named_buffers(), strict=True):
        assert torch.equal(a, b) and not is_lazy(b), name

eager, state = eagerly(Tied)
for placements in (
    Shard(0), [Shard(0)], Replicate(), (Shard(-1),),
    {"*embedding.weight": Shard(1), "body.*": [Shard(0)], "head.bias": None},
    lambda name, parameter: Shard(1) if parameter.dim() > 1 else Replicate(),
    lambda name, parameter: None,
):
    lazy = lazily(Tied)
    lazy.embedding.weight.mark = "kept"
    assert LazyInitContext.materialize(lazy, device_mesh=mesh, placements=placements) is lazy
    compare(eager, state, lazy)
    assert lazy.head.weight is lazy.embedding.weight and lazy.head.weight.mark == "kept"
    assert all(a is b for a, b in zip(lazy.body._flat_weights, lazy.body.parameters(), strict=True))
    assert lazy.kept[0] is lazy.body.weight_hh_l0 and lazy.kept[1]["tuple"][0] is lazy.head.bias
lazy = lazily(Tied)
materialize(lazy, device_mesh=mesh, placements={"*embedding.weight": Shard(1), "head.bias": None})
assert lazy.embedding.weight.placements == (Shard(1),) and lazy.embedding.weight.to_local().shape == (11, 3)
assert lazy.body.weight_ih_l0.placements == (Replicate(),) and type(lazy.head.bias) is nn.Parameter

# sharded parameters train: the gradients are those of the whole model
def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
eager, state = eagerly(mlp)
lazy = lazily(mlp)
materialize(lazy, device_mesh=mesh, placements={"0.*": Shard(0), "2.weight": Shard(1)})
x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
eager(x).sum().backward()
lazy(DTensor.from_local(x, mesh, [Replicate()])).full_tensor().sum().backward()
assert all(torch.allclose(a.grad, b.grad.full_tensor()) for a, b in zip(eager.parameters(), lazy.parameters()))

# two mesh dimensions, one of them of a single rank
flat = init_device_mesh("cpu", (1, size))
eager, state = eagerly(Tied)
lazy = lazily(Tied)
materialize(lazy, device_mesh=flat, placements=[Shard(0), Shard(0)])
compare(eager, state, lazy)

lazy = lazily(Tied)
go = lambda placements, mesh=mesh: materialize(lazy, device_mesh=mesh, placements=placements)
raises(TypeError, "together", lambda: materialize(lazy, device_mesh=mesh))
raises(TypeError, "together", lambda: materialize(lazy, placements=Shard(0)))
raises(TypeError, "no sink", lambda: materialize(lazy, lambda p, v: v, device_mesh=mesh, placements=Shard(0)))
raises(TypeError, "DeviceMesh", lambda: go(Shard(0), "cpu"))
raises(TypeError, "got int", lambda: go(3))
raises(ValueError, "no dimension 1", lambda: go(Shard(1)))
raises(ValueError, "one placement for each of the 1", lambda: go([Shard(0), Shard(0)]))
raises(ValueError, "Shard or Replicate", lambda: go(Partial()))
raises(ValueError, "no parameter is called", lambda: go({"encoder.*": Shard(0)}))
raises(ValueError, "are one parameter", lambda: go({"head.weight": Shard(1), "embedding.weight": Shard(0)}))
raises(ValueError, "real tensor already", lambda: materialize(nn.Linear(2, 2), device_mesh=mesh, placements=Shard(0)))
assert all(is_lazy(p) for p in lazy.parameters())
different = lazily(Tied, seed=rank)
raises(ValueError, "same number on every rank", lambda: materialize(different, device_mesh=mesh, placements=Shard(0)))
lazy = lazily(Tied)
go(Shard(0))
compare(eager, state, lazy)
print("done")
"""

MEMORY = r"""
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
def build():
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
materialize(lazily(lambda: nn.Linear(1024, 8)), device_mesh=mesh, placements=Shard(0))
model = lazily(build)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
start = status("VmRSS:")
materialize(model, device_mesh=mesh, placements=Shard(0))
print(status("VmRSS:") - start, status("VmHWM:") - start)
del model
"""


# gloo's threads abort the process now and then when the interpreter tears them down ("terminate called ...").
LEAVE = "\nimport os; sys.stdout.flush(); os._exit(0)\n"


def run(script: str, folder: Path, size: int = 2) -> list[str]:
    children = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script + LEAVE, str(rank), str(size),
                          str(folder / "store")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait(20)
    for child, (_, _errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, "\n".join(text[-3000:] for _, text in outputs)
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of two ranks says, one line of its memory and one at the end."""
    of_memory = MEMORY if Path("/proc/self/clear_refs").exists() else ""
    return [output.splitlines() for output in run(PRELUDE + of_memory + CORRECTNESS, tmp_path_factory.mktemp("ranks"))]


def test_shards_put_together_are_the_eager_model_and_misuse_is_refused(said):
    assert [lines[-1] for lines in said] == ["done", "done"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak RSS")
def test_each_rank_holds_its_shards_and_one_tensor(said):
    tensor, shards = 4 << 20, 24 * (2 << 20)
    for lines in said:
        kept, peak = map(int, lines[-2].split())
        print(f"kept {kept / 2**20:.1f} MiB of shards {shards / 2**20:.0f} MiB, peak {peak / 2**20:.1f} MiB")
        assert kept < shards + 2 * tensor
        assert peak < shards + 4 * tensor  # the whole model would be shards + 12 tensors
