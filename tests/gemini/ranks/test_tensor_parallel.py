"""Models of DTensors under management train as they do in plain torch, bit for bit."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from rank_training import SMALL
from safetensors.torch import load_file
from tensor_parallel_training import CONFIG, TensorParallel, check_tensor_parallel, local, mesh_of, whole
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from transformers import LlamaForCausalLM

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import RankError
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.tensor_parallel import LocalPart, whole_norms
from gemini.tensor_parallel.sharding import Sharding

STREAMED = {"device_memory": "24KiB", **SMALL}
DISK = {"host_memory": "300KiB", "offload_dir": "/tmp", **SMALL}


class OneRow(TensorParallel):
    dp = 1
    micro_batches = 2


class TwoRows(TensorParallel):
    """Saves what it has in the end, and finds the same in the file."""

    def end(self):
        ended = super().end()
        if self.is_managed:
            file = f"{os.environ['XDG_STATE_HOME']}/model.safetensors"
            self.booster.save_model(self.model, file)
            same(dict(sorted(load_file(file).items())), dict(sorted(ended.weights.items())))
            dist.barrier()
        return ended


@pytest.mark.heavy
@pytest.mark.parametrize("tiers", [{}, STREAMED], ids=["resident", "streamed"])
def test_two_rows_of_two_ranks_train_as_one_row_does_in_plain_torch(worlds, tiers):
    check_tensor_parallel(worlds(4), TwoRows, max_norm=0.05, **tiers)


@pytest.mark.parametrize("tiers", [{}, STREAMED, DISK], ids=["resident", "streamed", "disk"])
def test_one_row_trains_as_in_plain_torch(worlds, tiers):
    check_tensor_parallel(worlds(2), OneRow, **tiers)


class TpPlan(OneRow):
    """Made parallel by transformers."""

    def build(self):
        from transformers.distributed import DistributedConfig

        folder = f"{os.environ['XDG_STATE_HOME']}/llama"  # the same for all ranks
        dist.barrier()
        LlamaForCausalLM(CONFIG).save_pretrained(folder)  # it writes on the first one
        dist.barrier()
        return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))

    def end_step(self, step):
        super().end_step(step)
        with torch.no_grad():  # transformers computes with local tensors then
            self.ended.seen.append(self.loss(0).item())


def test_the_plan_of_transformers_trains_as_in_plain_torch(worlds):
    pytest.importorskip("transformers.distributed")
    check_tensor_parallel(worlds(2), TpPlan, **STREAMED)


class Sequence(OneRow):
    """All parameters are DTensors, so that torch's own clipping takes them. Those of the norms are replicated."""

    micro_batches = 1
    width = 30  # is cut into parts of 15, whose sizes are no multiples of anything

    def build(self):
        model = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, 44), nn.Linear(44, self.width))
        plan = {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        return parallelize_module(model, self.mesh["tp"], plan)

    def batch(self, number):
        return torch.randn(2, 6, self.width, generator=torch.Generator().manual_seed(number))

    def loss(self, number):
        batch = distribute_tensor(self.batch(number), self.mesh["tp"], [Shard(1)])
        return self.model(batch).square().mean().full_tensor()

    def clip(self):
        for leaf in self.leaves.values():
            leaf.grad = self.gradient(leaf)  # those of the norm are Partial, and torch would clip the addends
        norm = torch.nn.utils.clip_grad_norm_(self.leaves.values(), self.max_norm)
        self.ended.seen.append(whole(norm).item())


def test_sequence_parallel_with_the_clipping_of_torch(worlds):
    check_tensor_parallel(worlds(2), Sequence, max_norm=0.05)


def built(lazy=False):
    """A model of one sharded and one replicated matrix, its optimizer, and the values before."""
    torch.manual_seed(0)
    mesh = mesh_of(1)["tp"]
    if not lazy:
        model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        return model, HybridAdam(model.parameters(), lr=0.1), before
    with LazyInitContext():
        model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    placements = {"0.*": Shard(0), "1.weight": Shard(1), "1.bias": Replicate()}
    LazyInitContext.materialize(model, device_mesh=mesh, placements=placements)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return model, HybridAdam(model.parameters(), lr=0.1), {}


def boost(model, optimizer, **options):
    plugin = GeminiPlugin(precision="fp32", telemetry=False, **{"process_group": mesh_of(1)["dp"], **options})
    return plugin, *Booster(plugin=plugin).boost(model, optimizer)[:2]


def same(ours, theirs):
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def use_outside(folder):
    model, optimizer, before = built()
    kept = model[0].weight
    plugin, model, optimizer = boost(model, optimizer)
    booster = Booster(plugin=plugin)
    same(dict(gemini.named_tensors(model)), before)
    same(model.state_dict(), before)
    same(model[0].state_dict(prefix="0."), {name: before[name] for name in ("0.weight", "0.bias")})
    assert type(model[0]).__name__ == "Linear"
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 6), (5,), (6, 5), (6,)]
    assert isinstance(model[0].weight, DTensor)
    assert torch.equal(model[0].weight.full_tensor(), before["0.weight"])
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"] * 2)
    with pytest.raises(RuntimeError, match="was a parameter of a model that has been boosted"):
        kept + 1
    with pytest.raises(RuntimeError, match="was a parameter of a model that has been boosted"):
        kept.to_local()

    booster.backward(model(torch.ones(2, 6)).sum(), optimizer)
    with pytest.raises(RuntimeError, match=r"this rank's part of the gradient of a DTensor.*clip_grad_by_norm"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    after = model.state_dict()
    booster.save_model(model, f"{folder}/one.safetensors")
    booster.save_model(model, f"{folder}/many", shard=True, size_per_shard="100B")
    with pytest.raises(ValueError, match=r"save_optimizer cannot put together"):
        booster.save_optimizer(optimizer, f"{folder}/optimizer")
    plain = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    dist.barrier()
    booster.load_model(plain, f"{folder}/one.safetensors")
    same(plain.state_dict(), after)

    model.load_state_dict(before)
    same(model.state_dict(), before)
    booster.load_model(model, f"{folder}/many")
    same(model.state_dict(), after)
    model[0].load_state_dict({"weight": before["0.weight"], "bias": before["0.bias"]})
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    return after


def test_outside_of_training_tensors_are_whole(worlds, tmp_path):
    first, second = worlds(2).run(use_outside, str(tmp_path))
    same(first, second)


def failed_save():
    _, model, _ = boost(*built()[:2])
    Booster(plugin=GeminiPlugin(telemetry=False)).save_model(model, "/proc/nowhere/model.safetensors")


def test_a_save_that_fails_on_the_first_rank_fails_on_all(worlds):
    first, second = worlds(2).outcomes(failed_save)
    assert first.error.startswith("CheckpointError: /proc/nowhere")
    assert second.error.startswith("RankError: rank 0 failed in save_model to /proc/nowhere/model.safetensors")


def begin_lazily():
    _, model, _ = boost(*built(lazy=True)[:2])
    same(model.state_dict(), built()[2])


def test_lazy_models_materialise_the_part_of_each_rank(worlds):
    worlds(2).run(begin_lazily)


def go_on():
    model, _, _ = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [{name: local(value).clone() for name, value in optimizer.state[p].items()} for p in model.parameters()]
    values = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    _, model, optimizer = boost(model, optimizer)
    same(model.state_dict(), values)
    states = optimizer.state_dict()["state"]
    for number, state in enumerate(before):
        same({name: torch.as_tensor(states[number][name]).to(state[name]) for name in state}, state)


def test_an_optimizer_that_has_stepped_goes_on_with_the_parts_of_its_states(worlds):
    worlds(2).run(go_on)


def refuse():
    def check(match, parallel=None, **options):
        model, optimizer, _ = built() if parallel is None else (parallel, HybridAdam(parallel.parameters()), None)
        given, classes = list(model.parameters()), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=match):
            boost(model, optimizer, **options)
        assert [id(p) for p in model.parameters()] == [id(p) for p in given]
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in given]
        assert [type(m) for m in model.modules()] == classes
        assert torch.isfinite(whole(given[0].detach())).all()

    for group in (None, mesh_of(1), mesh_of(2)):
        check(r"GeminiPlugin\(process_group=mesh\[\"dp\"\]\)", process_group=group)
    for mesh, placements, match in (
        (mesh_of(1), [Replicate(), Shard(0)], "on a mesh of 2 dimensions; put it on the tensor-parallel one alone"),
        (mesh_of(1)["tp"], [Shard(0)], "that has a gradient already: call optimizer.zero_grad"),
    ):
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, placements))
        model.weight.grad = torch.zeros_like(model.weight)
        check(match, model)


def test_what_cannot_be_kept_is_refused_and_all_is_as_it_was(worlds):
    worlds(2).run(refuse)


def norms():
    """The rank that has them, and norms of parts put together."""
    rank = dist.get_rank()
    part = nn.Linear(4, 4, bias=False)
    parallelize_module(part, mesh_of(1)["tp"], ColwiseParallel())
    local, replicated = LocalPart.of(part.weight, Sharding.of(part.weight)), nn.Parameter(torch.ones(2))
    here = [torch.tensor(3.0 + rank), torch.tensor(7.0)]
    found = [[norm.item() for norm in whole_norms([local, replicated], here, order)] for order in (2.0, 1.0, math.inf)]
    bad = [torch.tensor(math.inf if rank else 1.0), torch.tensor(7.0)]
    with pytest.raises(RankError, match=r"rank 1 has gradients of 2 sharded parameters, rank 0 of 1"):
        whole_norms([local, local if rank else replicated], here, 2.0)
    return found, whole_norms([local, replicated], bad, 2.0)[0].item()


def test_norms_of_parts_are_put_together_and_others_count_once(worlds):
    expected = [[5.0, 7.0], [7.0, 7.0], [4.0, 7.0]], math.inf
    assert worlds(2).run(norms) == [expected, expected]
