"""scripts/faults soak: thirty steps of it, and that a leak and a difference are failures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SLOPE, _SMALL, _STEPS = 2048, 100, 100


def soak(folder: Path, *arguments: object) -> dict[str, Any]:
    file = folder / "soak.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/faults"), "soak", "--json", str(file), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert file.exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_thirty_steps_are_equal_and_each_look_is_told(tmp_path: Path) -> None:
    found = soak(tmp_path, "--steps", 30, "--every", 5, "--seed", 4, "--plot", tmp_path / "soak.svg")
    assert found["equal"], found
    assert sum(found["events"].values()) == 30 and len(found["events"]) > 8
    assert len(found["readings"]) == 6
    # So few steps are all warm-up, so nothing is said of slopes; yet what is counted is what is there.
    assert found["furthest_from_it_bytes"] < 8 << 20
    assert (tmp_path / "soak.svg").read_text().endswith("</svg>\n")


def judge(
    leak_bytes_a_step: float = 0.0, extra_thread_at: int = -1, band_at: int = -1, of_plain_bytes: float = 0.0
) -> dict[str, Any]:
    """What is said of made-up readings at two placements."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts/faults/soak.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts/faults"))
    try:
        spec.loader.exec_module(module)
        from soaking.readings import Reading

        readings = [
            Reading(
                step=20 * n,
                placement="disk" if n % 2 else "RAM",
                resident_bytes=int(
                    300e6 + (1e6 if n % 2 else 0) + 20 * n * leak_bytes_a_step + (6e6 if n == band_at else 0)
                ),
                data_bytes=4 * 10**8,
                descriptors=4 + n % 2,
                threads=10 + (n == extra_thread_at),
                ledger_bytes=10**7,
            )
            for n in range(_STEPS)
        ]
        found: dict[str, Any] = module.judged(readings, of_plain_bytes)
    finally:
        sys.path.remove(str(ROOT / "scripts/faults"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "soaking"]:
            del sys.modules[name]
    return found


def test_what_stays_as_it_is_passes_and_what_grows_fails() -> None:
    assert judge()["ok"] and judge()["slope_bytes_a_step"] == 0
    assert not judge(leak_bytes_a_step=_SLOPE)["ok"]
    assert judge(leak_bytes_a_step=_SMALL)["interval_bytes_a_step"] == [_SMALL, _SMALL]
    assert not judge(leak_bytes_a_step=_SMALL)["ok"]
    assert judge(leak_bytes_a_step=_SMALL, of_plain_bytes=_SMALL)["ok"], "plain PyTorch grows as much"
    assert judge(leak_bytes_a_step=_SLOPE)["slope_bytes_a_step"] == _SLOPE
    assert not judge(extra_thread_at=90)["ok"]
    assert not judge(band_at=80)["ok"]
