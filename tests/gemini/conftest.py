"""Fixtures of the tests that train."""

from typing import Any

import pytest
from backward_runs import BACKWARD_PLACEMENTS
from loop import PLACEMENTS


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    return _in_folder(request.param, tmp_path)


@pytest.fixture(params=["streamed"])
def backward_placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    """For ``update_in_backward``; `backward_runs.everywhere` has all of them tried."""
    return _in_folder(BACKWARD_PLACEMENTS[request.param], tmp_path)


def _in_folder(placement: dict[str, Any], folder: Any) -> dict[str, Any]:
    return {**placement, "offload_dir": folder} if "offload_dir" in placement else dict(placement)
