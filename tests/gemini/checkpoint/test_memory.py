"""Saving and loading stream: what they take beside the model does not grow with it."""

import json
from pathlib import Path

from checkpoint_cases import child

TENSOR_MIB = 4
SLACK_MIB = 3


def test_saving_and_loading_128_mib_takes_little_more_than_the_largest_tensor(tmp_path: Path) -> None:
    growth = json.loads(child("child_memory.py", tmp_path).stdout.splitlines()[-1])
    assert growth.pop("state_dict") > 100  # gathers everything: the measurement sees it
    excess = {name: mib for name, mib in growth.items() if mib > TENSOR_MIB + SLACK_MIB}
    assert not excess, growth
    assert sum((tmp_path / "whole" / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")) > 3 << 27
