"""A step whose updates are handed over is completed, also where memory runs out in what comes after that."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same
from torch import Tensor

from gemini.chunk.chunk import Chunk
from gemini.chunk.full_copies import FullCopies
from gemini.chunk.manager import ChunkManager
from gemini.engine.engine import Engine
from gemini.errors import TornStep
from gemini.updates.ahead import UpdatesAhead
from gemini.updates.averages import Averages
from gemini.updates.commitment import ATTEMPTS, surely
from gemini.updates.gradients import Gradients
from gemini.updates.scaling import Scaling
from gemini.updates.trial import Trial
from gemini.updates.update_queue import UpdateQueue

AFTER = {
    "an update noted": (Chunk, "begin_update"),
    "a full copy taken over": (FullCopies, "take_over"),
    "a gradient let go": (ChunkManager, "release_gradient_after"),
    "a gradient handed over": (Gradients, "hand_over"),
    "an average": (Averages, "stepped"),
    "the scale": (Scaling, "stepped"),
    "the end": (Engine, "step_ended"),
    "updates arranged": (UpdateQueue, "arrange"),
    "a result confirmed": (Trial, "confirm"),
    "a result called off": (Trial, "call_off"),
    "guesses judged": (UpdatesAhead, "_judge"),
}
OF_UPDATES_AHEAD = (
    "a full copy taken over",
    "updates arranged",
    "a result confirmed",
    "a result called off",
    "guesses judged",
)


class Seeded(Trained):
    """Two of them drop the same elements in the same step."""

    def loss(self, step: int) -> Tensor:
        torch.manual_seed(step)
        return super().loss(step)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("comes", ["before it", "after it"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("part", AFTER)
def test_memory_that_runs_out_once_in_what_follows_costs_nothing(
    part: str, placement: str, comes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cls, name = AFTER[part]
    ours, plain = Seeded(PLACEMENTS[placement]), Seeded(None)
    for number in range(3):  # updates begin ahead of the third step
        assert ours.step(number) == plain.step(number)
    original, failed = vars(cls)[name], 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if failed:
            return original(*args, **kwargs)
        failed += 1
        if comes == "after it":
            original(*args, **kwargs)
        raise MemoryError

    loss = ours.loss(3)
    ours.backward(loss)
    monkeypatch.setattr(cls, name, failing)
    ours.optimizer.step()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ours.optimizer.zero_grad()
    assert loss.item() == plain.step(3)
    assert failed == 1 or (part in OF_UPDATES_AHEAD and placement != "disk")
    check_same(ours, plain)
    assert ours.step(4) == plain.step(4)
    check_same(ours, plain)


def test_where_memory_never_comes_the_step_is_torn() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise MemoryError("no room for a number")

    with pytest.raises(TornStep, match=r"memory ran out 8 times .*no room for a number.*load a checkpoint"):
        surely(fails)
    assert len(calls) == ATTEMPTS
    with pytest.raises(ValueError, match="other mistakes come at once"):
        surely(lambda: (_ for _ in ()).throw(ValueError("other mistakes come at once")))
