"""Saving and loading stream: what they take beside the model does not grow with it."""

import json
from pathlib import Path

from checkpoint_cases import child

BLOCKS_MIB = 4 * 2
"""Of the threads that move blocks."""
SLACK_MIB = 2


def test_saving_and_loading_128_mib_in_tensors_of_16_takes_a_few_blocks(tmp_path: Path) -> None:
    growth = json.loads(child("child_memory.py", tmp_path).stdout.splitlines()[-1])
    assert growth.pop("state_dict") > 100  # gathers everything: the measurement sees it
    excess = {name: mib for name, mib in growth.items() if mib > BLOCKS_MIB + SLACK_MIB}
    assert not excess, growth
    assert sum((tmp_path / "whole" / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")) > 3 << 27
