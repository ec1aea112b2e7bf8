"""Train, save, load and train on, in a process of its own: ``child_resume.py first|second FOLDER THREADS``."""

import sys
from pathlib import Path

import torch
from checkpoint_cases import boost, gpt2, train

from gemini.checkpoint import named_tensors
from gemini.chunk import MASTER, Tier


def run(part: str, folder: Path, precision: str) -> None:
    """``first`` trains three steps on disk and saves; ``second`` loads in RAM, into other weights, and trains three."""
    work = folder / precision
    disk = folder / "offload" if part == "first" else None
    booster, model, optimizer = boost(gpt2(seed=0 if part == "first" else 1), precision, disk)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    if part == "first":
        homes = {chunk.homes[MASTER].tier for chunk in model._gemini.manager.chunks}
        assert Tier.DISK in homes and len(homes) > 1, homes  # a test of less otherwise
        train(booster, model, optimizer, range(3), scheduler)
        booster.save_model(model, work, shard=True, size_per_shard="20KiB")
        booster.save_optimizer(optimizer, work, shard=True, size_per_shard="20KiB")
        booster.save_optimizer(optimizer, work / "optimizer.pt")
        booster.save_lr_scheduler(scheduler, work / "scheduler.pt")
    else:
        for source in (work, work / "optimizer.pt"):
            train(booster, model, optimizer, range(10, 12), scheduler)  # nothing of it may be left after loading
            booster.load_model(model, work)
            booster.load_optimizer(optimizer, source)
            booster.load_lr_scheduler(scheduler, work / "scheduler.pt")
            losses = train(booster, model, optimizer, range(3, 6), scheduler)
            result = (losses, dict(named_tensors(model)), optimizer.state_dict())
            torch.save(result, work / f"from-{source.name}.result")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    for each in ("fp32", "bf16", "fp16"):
        run(sys.argv[1], Path(sys.argv[2]), each)
