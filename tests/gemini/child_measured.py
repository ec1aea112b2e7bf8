"""Trains one configuration for some steps and prints its measured peaks; see test_estimate_measured.py.

    python child_measured.py SPEC FIELDS BATCH SEQ_LEN CHECKPOINTING PRECISION [CAP_BYTES HOST_MEMORY OFFLOAD_DIR]

With a cap, RLIMIT_DATA is set to that much more than the warm process has.
"""

import gc
import json
import resource
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
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    inputs: dict[str, Any] = subject.batch(batch, length)
    for _ in range(steps):
        booster.backward(loss_of(model(**inputs)), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    boosted(model).manager.settle()
    return model


def main() -> None:
    spec, fields, batch, length, checkpointing, precision, *cap = sys.argv[1:]
    subject = find_subject(spec, json.loads(fields))
    plugin: dict[str, Any] = {"precision": precision}
    if cap:
        # Libraries, kernels and thread pools first, so that the cap is about the training alone.
        small = find_subject(spec, {**json.loads(fields), "n_layer": 1, "n_embd": 64, "n_head": 2})
        train(small, 2, 32, bool(int(checkpointing)), 2, precision=precision)
        gc.collect()
        data = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + int(cap[0]), data + int(cap[0])))
        plugin["host_memory"] = int(cap[1])
        if len(cap) > 2:
            plugin["offload_dir"] = cap[2]
    model = train(subject, int(batch), int(length), bool(int(checkpointing)), 3, **plugin)
    print(json.dumps(model.memory_stats()))


if __name__ == "__main__":
    main()
