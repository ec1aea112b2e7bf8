"""Fixtures of the tests that train."""

from typing import Any

import pytest
from loop import PLACEMENTS


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    chosen = dict(request.param)
    if "offload_dir" in chosen:
        chosen["offload_dir"] = tmp_path
    return chosen
