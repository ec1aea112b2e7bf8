"""Several optimizers of one model, as Muon for matrices and AdamW for the rest: the bits of the same in plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import GPT2Config, GPT2LMHeadModel

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

VOCABULARY = 208
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "300KiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
    "disk": {"host_memory": "1MiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
}


def build() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_head=2, n_layer=3, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def optimizers_of(model: nn.Module, others: Any = torch.optim.AdamW) -> list[Any]:
    matrices = [p for key, p in model.named_parameters() if p.dim() == 2 and ".h." in key]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    decayed = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2]},
    ]
    options = {"fused": True} if others is torch.optim.AdamW else {}
    return [torch.optim.Muon(matrices, lr=1e-2), others(decayed, lr=1e-3, **options)]


class Run:
    """A GPT-2 in plain torch, or boosted, with both optimizers and a scheduler for each."""

    def __init__(self, place: dict[str, Any] | None, others: Any = torch.optim.AdamW, **plugin: Any) -> None:
        self.model: Any = build()
        self.optimizers: Any = optimizers_of(self.model, others)
        self.schedulers = [lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in self.optimizers]
        self.booster: Any = None
        if place is not None:
            options: dict[str, Any] = {"precision": "fp32", "telemetry": False, **place, **plugin}
            self.booster = Booster(plugin=GeminiPlugin(**options))
            self.model, self.optimizers, *_ = self.booster.boost(self.model, self.optimizers)

    def backward(self, number: int, micro_batches: int = 1) -> float:
        loss = torch.zeros(())
        for micro in range(micro_batches):
            generator = torch.Generator().manual_seed(100 * micro + number)
            tokens = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
            loss = self.model(input_ids=tokens, labels=tokens).loss
            if self.booster is not None:
                self.booster.backward(loss, self.optimizers)
            else:
                loss.backward()
        return float(loss.detach())

    def step_each(self) -> None:
        for each in self.optimizers:
            each.step()
            each.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()

    def step_all(self) -> None:
        if self.booster is None:
            self.step_each()
            return
        self.optimizers.step()
        self.optimizers.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()


def check_same(ours: Run, plain: Run) -> None:
    weights = ours.model.state_dict()
    assert not [key for key, value in plain.model.state_dict().items() if not torch.equal(weights[key], value)]
    for mine, theirs in zip(ours.optimizers, plain.optimizers, strict=True):
        check_same_states(mine.state_dict(), theirs.state_dict())


def check_same_states(found: Any, expected: Any) -> None:
    assert found["state"].keys() == expected["state"].keys()
    assert [group["lr"] for group in found["param_groups"]] == [group["lr"] for group in expected["param_groups"]]
    for index, state in expected["state"].items():
        assert {"step", *found["state"][index]} == {"step", *state}
        for name, value in state.items():
            assert torch.equal(found["state"][index][name], value), (index, name)


def placed(place: str, folder: Path) -> dict[str, Any]:
    return {**PLACES[place], **({"offload_dir": folder} if place == "disk" else {})}


@pytest.mark.parametrize("steps", ["each", "all"])
@pytest.mark.parametrize("place", PLACES)
def test_muon_and_adamw_train_as_in_plain_torch(place: str, steps: str, tmp_path: Path) -> None:
    ours, plain = Run(placed(place, tmp_path)), Run(None)
    for number in range(4):
        micro_batches = 2 if number == 2 else 1
        assert ours.backward(number, micro_batches) == plain.backward(number, micro_batches)
        if number % 2:
            norms = [float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)) for run in (ours, plain)]
            assert norms[0] == norms[1]
        ours.step_each() if steps == "each" else ours.step_all()
        plain.step_all()
    check_same(ours, plain)
