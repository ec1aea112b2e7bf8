"""A rank holds its share of the model, also while it is built; by the system's count."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).with_name("child_rank_memory.py")
SECONDS = 240
ALLOWED_SHARE = 0.27
"""Of four ranks."""

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2 * SECONDS)]


@cache
def of_each_rank(world: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CHILD)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, said) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, said[-2000:]
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]


@pytest.mark.parametrize("what", ["model_data_bytes", "boost_peak_bytes"])
def test_a_rank_of_four_holds_a_quarter(what):
    (alone,) = of_each_rank(1)
    for rank in of_each_rank(4):
        assert rank[what] <= ALLOWED_SHARE * alone[what]


def test_the_ranks_of_the_measurement_train_the_same_model():
    (alone,) = of_each_rank(1)
    assert [rank["loss"] for rank in of_each_rank(4)] == [alone["loss"]] * 4
