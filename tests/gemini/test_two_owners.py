"""A model whose chunks are kept by two owners, half each, trains with the bits of one owner."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, WIDTH, batch
from torch import Tensor, nn
from two_owners import Owners, check_owners

from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(120)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))


def loss(model: nn.Module, number: int) -> Tensor:
    torch.manual_seed(number)  # for the dropout
    return model(batch(number)).float().square().mean()  # type: ignore[no-any-return]


def build() -> tuple[nn.Module, Any]:
    model = build_model()
    return model, HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def both(*arguments: Any, **plugin: Any) -> tuple[Owners, Owners]:
    return Owners(2, *arguments, **plugin), Owners(1, *arguments, **plugin)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_two_owners_train_as_one_that_accumulates_their_batches(place: str, precision: str) -> None:
    ours, alone = both(build, loss, precision=precision, **PLACEMENTS[place])
    assert ours.train(4) == alone.train(4)
    check_owners(ours, alone)
    assert ours.shared.gathered_numel > 0
    assert not any(chunk.is_whole for manager in ours.shared.managers for chunk in manager.chunks)
