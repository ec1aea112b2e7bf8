"""Trains one configuration for some steps and prints its measured peaks; see test_estimate_measured.py.

    python child_measured.py SPEC FIELDS BATCH SEQ_LEN CHECKPOINTING PRECISION [PLUGIN]

PLUGIN are further arguments of GeminiPlugin, as JSON. child_solved.py trains by the same function.
"""

import json
import sys
from typing import Any

import torch

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.estimate.activations import _checkpoint
from gemini.estimate.subject import Subject, find_subject, loss_of
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam


def train(subject: Subject, batch: int, length: int, checkpointing: bool, steps: int, **plugin: Any) -> Any:
    torch.manual_seed(0)
    with LazyInitContext():
        model = subject.build()
    if checkpointing:
        _checkpoint(model)
    model.train()
    booster = Booster(plugin=GeminiPlugin(**{"telemetry": False, **plugin}))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    inputs: dict[str, Any] = subject.batch(batch, length)
    for _ in range(steps):
        booster.backward(loss_of(model(**inputs)), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    boosted(model).manager.settle()
    return model


def main() -> None:
    spec, fields, batch, length, checkpointing, precision, *plugin = sys.argv[1:]
    subject = find_subject(spec, json.loads(fields))
    more = json.loads(plugin[0]) if plugin else {}
    model = train(subject, int(batch), int(length), bool(int(checkpointing)), 3, precision=precision, **more)
    print(json.dumps(model.memory_stats()))


if __name__ == "__main__":
    main()
