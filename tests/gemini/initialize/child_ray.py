"""Trains under Ray Train: ``child_ray.py FOLDER RANKS ...`` writes the weights of each number of ranks to a file.

Ray imports the training function in processes of its own, so it is not in a test module, which needs pytest.
"""

import sys
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

import gemini

MICRO_BATCHES = 4
"""In each step; the ranks divide them."""


def train(options: dict[str, str]) -> None:
    group = dist.group.WORLD
    gemini.launch_from_torch()
    assert group is not None and dist.group.WORLD is group
    torch.manual_seed(5)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    data = torch.randn(32, 8)
    plugin = gemini.GeminiPlugin(precision="fp32", telemetry=False)
    booster = gemini.Booster(plugin=plugin)
    loader = plugin.prepare_dataloader(data, 2, shuffle=True, seed=7)
    model, optimizer, *_ = booster.boost(model, gemini.HybridAdam(model.parameters(), lr=0.1))
    for batch_number, batch in enumerate(loader, 1):
        booster.backward(model(batch).square().mean(), optimizer)
        if batch_number * dist.get_world_size() % MICRO_BATCHES == 0:
            optimizer.step()
            optimizer.zero_grad()
    weights = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(weights, options["file"])


def main(folder: Path, ranks: list[int]) -> None:
    ray.init(num_cpus=max(ranks), include_dashboard=False)
    for number in ranks:
        TorchTrainer(
            train,
            train_loop_config={"file": str(folder / f"{number}.pt")},
            torch_config=TorchConfig(backend="gloo", timeout_s=60),
            scaling_config=ScalingConfig(num_workers=number),
            run_config=RunConfig(storage_path=str(folder)),
        ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(ranks) for ranks in sys.argv[2:]])
