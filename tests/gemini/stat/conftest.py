"""Runs of these tests lie in a state folder of each test's own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("GEMINI_MEMORY_RUN_DIR", raising=False)
    return tmp_path / "state"
