"""Trains under torchrun, with checkpoints: ``child_restarted.py FOLDER [PLACE]``.

The last rank kills itself once, at the place: in ``forward``, in ``backward``, before ``step``, or before it takes part
in a ``save``. The start after that goes on from the last checkpoint. Each rank appends its losses to a file.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gemini

BETWEEN_CHECKPOINTS = 4
IN_STEP = 6
"""Training goes on from step 4, and what came after it is computed again."""


class Model(nn.Module):
    def __init__(self, fate: "Fate") -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 1)
        self.fate = fate

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.first(batch).tanh()
        self.fate.strike("forward")
        hidden.register_hook(lambda _: self.fate.strike("backward"))
        return self.second(hidden)


class Fate:
    """Kills the last rank at one place of one step, in the first start."""

    def __init__(self, folder: Path, place: str) -> None:
        self._mark = folder / "killed"
        self._place = place
        self._is_mine = dist.get_rank() == dist.get_world_size() - 1
        self._step = 0

    def next_step(self, step: int) -> None:
        self._step = step

    def strike(self, place: str) -> None:
        due = self._step == (2 * BETWEEN_CHECKPOINTS if place == "save" else IN_STEP)
        if due and place == self._place and self._is_mine and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, place: str) -> None:
    gemini.launch_from_torch(timeout=60)
    fate = Fate(folder, place)
    torch.manual_seed(5)
    model: nn.Module = Model(fate)
    data = torch.randn(48, 8)
    plugin = gemini.GeminiPlugin(precision="fp32", telemetry=False)
    booster = gemini.Booster(plugin=plugin)
    loader = plugin.prepare_dataloader(data, 2, shuffle=True, seed=7)
    model, optimizer, *_ = booster.boost(model, gemini.HybridAdam(model.parameters(), lr=0.1))
    step, latest = 0, folder / "latest.json"
    if latest.exists():
        state = json.loads(latest.read_text())
        step = state["step"]
        booster.load_model(model, str(folder / f"model{step}"))
        booster.load_optimizer(optimizer, str(folder / f"optimizer{step}"))
        loader.load_state_dict(state["loader"])
    for batch in loader:
        step += 1
        fate.next_step(step)
        loss = model(batch).square().mean()
        booster.backward(loss, optimizer)
        fate.strike("step")
        optimizer.step()
        optimizer.zero_grad()
        with (folder / f"losses{dist.get_rank()}").open("a") as losses:
            print(step, loss.item().hex(), file=losses)
        if step % BETWEEN_CHECKPOINTS == 0:
            fate.strike("save")
            booster.save_model(model, str(folder / f"model{step}"))
            booster.save_optimizer(optimizer, str(folder / f"optimizer{step}"))
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / "new.json").write_text(json.dumps({"step": step, "loader": loader.state_dict()}))
                (folder / "new.json").rename(latest)
    weights = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "nowhere")
