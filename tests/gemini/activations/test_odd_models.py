"""Models used in unusual ways, whose saved tensors leave memory and come back."""

from pathlib import Path
from typing import Any

import pytest
from odd_models import SMALL, batches
from odd_uses import IN_PLACE, USES
from parity import Task, check_parity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("build", "loss"), [*USES.values(), *IN_PLACE.values()], ids=[*USES, *IN_PLACE])
def test_an_unusual_use_trains_with_the_same_bits(build: Any, loss: Any, tmp_path: Path) -> None:
    check_parity(Task(build, batches(3), loss), offload_dir=tmp_path, activation_policy="offload", **SMALL)
