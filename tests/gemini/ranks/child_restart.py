"""One rank of test_restart.py: trains with a checkpoint after each step, and is killed once, if it is told when."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

STEPS = 5


def main(folder: Path, killed_at: int) -> None:
    gemini.launch_from_torch(timeout=30)
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.1))
    done = folder / "done"
    begin = int(done.read_text()) if done.exists() else 0
    if begin:
        booster.load_model(model, str(folder / f"{begin}.safetensors"))
        booster.load_optimizer(optimizer, str(folder / f"{begin}.optimizer"))
    for step in range(begin, STEPS):
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + rank))
        loss = model(batch).square().mean()
        if rank == 1 and step == killed_at and begin == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        with (folder / f"losses-{rank}").open("a") as file:
            file.write(f"{step} {loss.item()!r}\n")
        booster.save_model(model, str(folder / f"{step + 1}.safetensors"))
        booster.save_optimizer(optimizer, str(folder / f"{step + 1}.optimizer"))
        if rank == 0:
            (folder / "new").write_text(str(step + 1))
            (folder / "new").rename(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
