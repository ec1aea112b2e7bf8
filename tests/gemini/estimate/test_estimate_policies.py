"""What becomes of saved tensors changes what fits: ``gemini-stat estimate --activation-policy``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.estimate.activations import Activations, Ways
from gemini.estimate.subject import Subject
from gemini.planning.activation_choice import Choice
from gemini.stat.cli import main
from gemini.train.model import GPT2LMHeadModel, GPTConfig

MIB = 1 << 20
LAYERS, HIDDEN, LENGTH = 6, 256, 2048


def small_gpt() -> Any:
    """For the command: ``test_estimate_policies:small_gpt``."""
    config = GPTConfig(layers=LAYERS, hidden=HIDDEN, heads=4, seq_len=LENGTH)
    return GPT2LMHeadModel(config), tokens


def tokens(size: int, length: int) -> dict[str, torch.Tensor]:
    batch = torch.zeros(size, length, dtype=torch.long)
    return {"tokens": batch, "targets": batch}


SUBJECT = Subject("gpt", lambda: small_gpt()[0], tokens)


def of_choice(choice: Choice) -> Activations:
    return Activations(SUBJECT, torch.bfloat16, choice=choice)


def test_blocks_that_run_again_keep_their_inputs_and_what_one_of_them_saves() -> None:
    kept, again = (of_choice(c).tracked_bytes(1, LENGTH) for c in (Choice.KEEP, Choice.RECOMPUTE))
    one_input = LENGTH * HIDDEN * 2
    of_a_block = (kept - again + LAYERS * one_input) // (LAYERS - 1)
    assert 12 * one_input < of_a_block < 20 * one_input  # 17, by hand


def test_what_leaves_is_what_would_have_been_kept() -> None:
    kept, moved = of_choice(Choice.KEEP), of_choice(Choice.OFFLOAD)
    assert moved.tracked_bytes(1, LENGTH) < kept.tracked_bytes(1, LENGTH) / 4
    total = moved.tracked_bytes(1, LENGTH) + moved.away_bytes(1, LENGTH)
    assert kept.tracked_bytes(1, LENGTH) <= total < 1.2 * kept.tracked_bytes(1, LENGTH)


def test_a_policy_without_a_disk_moves_nothing() -> None:
    ways = [Ways(SUBJECT, torch.bfloat16, False, "auto", disk).all for disk in (0, 1 << 30)]
    assert [len(all_) for all_ in ways] == [2, 3]


@pytest.mark.parametrize(("policy", "fits"), [("keep", False), ("recompute", True), ("auto", True)])
def test_the_command_says_what_fits_with_a_policy(
    policy: str, fits: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model = "test_estimate_policies:small_gpt"
    asked = ["--ram", "125MiB", "--disk", "2GiB", "-s", str(LENGTH), "--activation-policy", policy, "--json"]
    code = main(["estimate", model, *asked])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], code) == (fits, 0 if fits else 3)
    assert answer["activation_policy"] == policy
    if fits:
        assert f'activation_policy="{policy}"' in answer["arguments"]
