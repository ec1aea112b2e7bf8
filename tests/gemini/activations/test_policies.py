"""Whatever a policy chooses, the bits are those of plain PyTorch."""

from pathlib import Path

import pytest
from odd_models import SMALL, batches
from odd_uses import IN_PLACE, USES
from parity import Task, check_parity
from torch import nn

from gemini.activations import make

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_USES = {**USES, **IN_PLACE}


def children(model: nn.Module) -> tuple[nn.Module, ...]:
    """Small blocks: all that a small model has."""
    return tuple(dict.fromkeys(c for c in model.children() if any(True for _ in c.parameters())))


def of_little_room(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(make, "room_bytes", lambda manager, device: nbytes)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ALL_USES)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
def test_blocks_that_run_again_leave_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, loss = ALL_USES[name]
    monkeypatch.setattr(make, "blocks_of", children)
    check_parity(Task(build, batches(3), loss), activation_policy="recompute", **SMALL)


FEW = ("checkpoint", "nested reentrant checkpoint", "retain_graph", "penalty in an attribute", "random depth")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "room"),
    [pytest.param(n, r, marks=() if n in FEW else pytest.mark.heavy) for n in ALL_USES for r in (0, 30_000)],
)
def test_blocks_that_are_chosen_for_leave_the_same_bits(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build, loss = ALL_USES[name]
    monkeypatch.setattr(make, "blocks_of", children)
    of_little_room(monkeypatch, room)
    check_parity(Task(build, batches(3), loss), activation_policy="auto", offload_dir=tmp_path, **SMALL)
