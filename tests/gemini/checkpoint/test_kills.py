"""Processes that are killed at any moment, and that read or write at once, leave and find whole checkpoints."""

import json
from collections import Counter

import pytest
from checkpoint_cases import child
from operations import folder_in_memory


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [6, 510])
def test_real_processes(kills: int) -> None:
    with folder_in_memory() as folder:
        done = child("child_kills.py", folder, kills, timeout=1100)
    table = json.loads(done.stdout.splitlines()[-1])
    for form, outcomes in table.items():
        print(f"{form:30s} {outcomes}")
        killed, read = (Counter(outcomes[kind]) for kind in ("killed", "read while two write"))
        assert killed["whole"] + killed["refused"] == kills // len(table)
        assert form == "pair" or not (killed["refused"] or read["refused"])
        assert read["whole"] > 0 or form == "pair"
    assert sum(outcomes["killed"].get("killed", 0) for outcomes in table.values()) >= kills // 2
