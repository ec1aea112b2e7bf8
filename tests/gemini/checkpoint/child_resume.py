"""Go on with saved runs, in a process of its own: ``child_resume.py FOLDER THREADS``. See ``test_resume``."""

import sys
from pathlib import Path

import torch
from resumed_runs import PRECISIONS, SOURCES, Run

from gemini.checkpoint import named_tensors


def go_on(folder: Path, precision: str, source: str) -> None:
    """Load into other weights, made lazily, in RAM and in chunks of another size, and train on."""
    run = Run(precision, seed=1, lazy=True)
    run.train(2)  # nothing of it may be left after loading
    run.load(folder / precision, source)
    losses = run.train(3)
    result = (losses, dict(named_tensors(run.model)), run.optimizer.state_dict(), torch.rand(2))
    torch.save(result, folder / precision / f"from-{source}.result")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    for each in PRECISIONS:
        for origin in SOURCES:
            go_on(Path(sys.argv[1]), each, origin)
