"""Uses outside of forward, where parameters are on a device with memory of its own."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from outside.catalogue import USES, cases
from outside.placements import SIMULATED
from simulated import SimulatedDevice

pytestmark = [
    pytest.mark.one_in(12, by="placement"),
    pytest.mark.own_process(),
    pytest.mark.usefixtures("_libraries"),
    pytest.mark.filterwarnings("ignore"),
]  # libraries' own warnings


@pytest.fixture(scope="session")
def _libraries() -> None:
    """Import all that uses need."""
    for library in {library for use in USES.values() for library in use.libraries}:
        if find_spec(library) is not None:
            import_module(library)


@pytest.mark.parametrize(("name", "placement"), cases(SIMULATED))
def test_a_use_is_equal_to_plain_pytorch_or_refused(
    name: str, placement: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    for library in USES[name].libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")
    verdict = USES[name].judge(SIMULATED[placement], str(tmp_path))
    assert verdict.is_right, f"{verdict.kind}: {verdict.text}"
