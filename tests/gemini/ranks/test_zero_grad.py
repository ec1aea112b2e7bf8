"""``zero_grad`` drops what came before it, also where other ranks are ahead."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

STEPS = 3
WIDTH = 16


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def loss(model: nn.Module, number: int) -> Tensor:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
    return model(x).square().mean()


def weights_after_being_behind(hybrid_shard_size: int | None) -> list[Tensor]:
    """Each rank zeroes gradients again after those before it have run their backward."""
    model, rank, count = net(), dist.get_rank(), dist.get_world_size()
    plugin = GeminiPlugin(precision="fp32", host_memory="64MiB", telemetry=False, hybrid_shard_size=hybrid_shard_size)
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(STEPS):
        optimizer.zero_grad()
        for turn in range(count):
            if turn == rank:
                optimizer.zero_grad()
                loss(model, step * count + rank).backward()
            dist.barrier()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def plain_weights(count: int) -> list[Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for rank in range(count):
            loss(model, step * count + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def check(worlds, count: int, hybrid_shard_size: int | None) -> None:
    [plain] = worlds(1).run(plain_weights, count)
    for weights in worlds(count).run(weights_after_being_behind, hybrid_shard_size):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, plain, strict=True))


def test_zero_grad_before_a_first_backward_keeps_what_faster_ranks_have_sent(worlds):
    check(worlds, 2, None)


def test_so_it_is_with_replicas(worlds):
    check(worlds, 2, 1)
