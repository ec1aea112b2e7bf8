"""Outside of forward parameters, gradients and states have plain PyTorch's meaning, or an error names the way out."""

from pathlib import Path

import pytest
from outside.catalogue import USES, cases
from outside.placements import PLACEMENTS

pytestmark = [
    pytest.mark.one_in(5),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]  # libraries' own warnings


@pytest.mark.parametrize(("name", "placement"), cases(PLACEMENTS))
def test_a_use_is_equal_to_plain_pytorch_or_refused(name: str, placement: str, tmp_path: Path) -> None:
    for library in USES[name].libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")
    verdict = USES[name].judge(PLACEMENTS[placement], str(tmp_path))
    assert verdict.is_right, f"{verdict.kind}: {verdict.text}"
