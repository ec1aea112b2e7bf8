"""The step that runs behind the next forward gives the bits of the one that is waited for."""

import random
import time
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained

from gemini.nn.optimizer.kernels.update import adam_update
from gemini.updates.update_pipeline import Block

pytestmark = pytest.mark.timeout(120)

STEPS = 50
LONGEST_STALL_SECONDS = 0.004


def stall_workers(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[str]:
    """Make the threads of the background update pause now and then; what they did, in order."""
    generator, done = random.Random(seed), []

    def stalling(name: str, work: Any) -> Any:
        def run(*args: Any) -> Any:
            if generator.random() < 0.3:
                time.sleep(generator.uniform(0, LONGEST_STALL_SECONDS))
            done.append(name)
            return work(*args)

        return run

    monkeypatch.setattr("gemini.nn.optimizer.rules.adam_rule.adam_update", stalling("compute", adam_update))
    for name in ("read", "write"):
        monkeypatch.setattr(Block, name, stalling(name, getattr(Block, name)))
    return done


def train(placement: dict[str, Any], waits: bool, precision: str) -> tuple[list[float], Trained]:
    run = Trained(placement, precision, max_norm=0.05)
    losses = []
    for step in range(STEPS):
        losses.append(run.step(step))
        if waits:
            run.model._gemini.manager.settle()
    return losses, run


@pytest.mark.parametrize(("placement", "precision"), [("resident", "fp32"), ("streamed", "bf16"), ("disk", "bf16")])
def test_fifty_overlapped_steps_with_stalls_equal_fifty_synchronous_ones(
    placement: str, precision: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(PLACEMENTS[placement])
    if "offload_dir" in options:
        options["offload_dir"] = tmp_path
    losses, synchronous = train(options, waits=True, precision=precision)
    expected = synchronous.weights()
    done = stall_workers(monkeypatch, seed=len(placement))
    overlapped_losses, overlapped = train(options, waits=False, precision=precision)
    assert overlapped_losses == losses
    found = overlapped.weights()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert done.count("compute") >= STEPS


def test_the_synchronous_run_equals_plain_training() -> None:
    plain = Trained(None)
    losses = []
    for step in range(5):
        loss = plain.loss(step)
        loss.backward()
        plain.optimizer.clip_grad_by_norm(0.05)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        losses.append(loss.item())
    ours = Trained({}, max_norm=0.05)
    assert [ours.step(step) for step in range(5)] == losses
    ours.model._gemini.manager.settle()
    for name, value in plain.weights().items():  # clipping in the kernel rounds once less than clipping in place
        torch.testing.assert_close(ours.weights()[name], value, rtol=1e-6, atol=1e-7)
