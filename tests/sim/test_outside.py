"""Uses outside of forward, where parameters are on a device with memory of its own."""

from pathlib import Path

import pytest
from outside.catalogue import USES, cases
from outside.placements import SIMULATED
from simulated import SimulatedDevice

pytestmark = [pytest.mark.own_process(), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings


@pytest.mark.parametrize(("name", "placement"), cases(SIMULATED))
def test_a_use_is_equal_to_plain_pytorch_or_refused(
    name: str, placement: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    verdict = USES[name].judge(SIMULATED[placement], str(tmp_path))
    assert verdict.is_right, f"{verdict.kind}: {verdict.text}"
