"""Training under Ray Train, which starts the ranks and makes their process group (``pip install "ray[train]"``)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gemini

CHILD = Path(__file__).with_name("child_ray.py")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'ray[train]'"),
]


def trained(folder: Path, *ranks: int) -> list[dict[str, torch.Tensor]]:
    # Ray writes to the home folder, and its workers find modules as the child does.
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    numbers = [str(number) for number in ranks]
    subprocess.run([sys.executable, str(CHILD), str(folder), *numbers], env=environment, timeout=240, check=True)
    return [torch.load(folder / f"{number}.pt") for number in ranks]


def test_a_worker_of_ray_trains_what_a_process_does(tmp_path: Path) -> None:
    (weights,) = trained(tmp_path, 1)
    torch.manual_seed(5)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    data = torch.randn(32, 8)
    optimizer = gemini.HybridAdam(model.parameters(), lr=0.1)
    plain: DataLoader[torch.Tensor] = DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(7))
    for number, batch in enumerate(plain, 1):
        model(batch).square().mean().backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_two_workers_of_ray_train_what_one_does(tmp_path: Path) -> None:
    one, two = trained(tmp_path, 1, 2)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
