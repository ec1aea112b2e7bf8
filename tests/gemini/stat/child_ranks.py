"""A rank that trains a small model; rank 1 takes longer, and is killed before torchrun starts the ranks again."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

STEPS = 8


def main() -> None:
    gemini.launch_from_torch()
    torch.manual_seed(0)
    slow, is_first = dist.get_rank() == 1, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    booster = Booster(plugin=GeminiPlugin(precision="fp32"))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-3))
    for step in range(STEPS):
        if slow and is_first and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.6 if slow else 0.3)  # the work of a step, more than what thins steps out
        booster.backward(model(torch.randn(4, 64)).mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
