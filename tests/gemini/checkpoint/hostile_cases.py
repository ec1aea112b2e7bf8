"""Training states that are compared as wholes, and files that are changed behind their checksums."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from state_uses import same
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import CheckpointError
from gemini.formats.json_file import CHECKSUM, checksum_of

Change = Callable[[Any], object]
NAN, INF = float("nan"), float("inf")
LONGEST_MESSAGE = 6000


class Small:
    """A boosted model of two layers, one step old, with its optimizer."""

    def __init__(self, cls: Any, seed: int = 0, precision: str = "fp32", steps: int = 1, **options: Any) -> None:
        torch.manual_seed(seed)
        self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False))
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        self.model, self.optimizer, *_ = self.booster.boost(model, cls(model.parameters(), **{"lr": 0.1, **options}))
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.booster.backward(self.model(torch.ones(3, 6)).square().sum(), self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> Any:
        """All that a load may change."""
        scaler = self.optimizer._managed.scaling.scaler
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), scaler))

    @contextmanager
    def refuses(self, path: Path | str, *words: str, error: type[Exception] = CheckpointError) -> Iterator[None]:
        """The body raises an error that names the path and has these words, and nothing changes."""
        before = self.everything()
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert not [word for word in (str(path), *words) if word not in message], message
        assert len(message) < LONGEST_MESSAGE
        assert same(self.everything(), before)


def rewrite(path: Path, change: Change) -> None:
    """Change a JSON file and the checksum that it has of itself, as somebody does who knows of it."""
    content = json.loads(path.read_text())
    change(content)
    if CHECKSUM in content:
        content[CHECKSUM] = checksum_of(content)
    path.write_text(json.dumps(content))


def resave(path: Path, change: Change) -> None:
    """Change what a file of ``torch.save`` holds."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
