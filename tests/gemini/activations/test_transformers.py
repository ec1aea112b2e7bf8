"""Models of transformers with each policy, both kinds of checkpointing and all tiers: the bits of plain PyTorch."""

import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Task, check_parity
from torch import nn

from gemini.activations import make

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 256
SIZE = {"chunk_config_dict": {1: {"chunk_size": 1 << 14}}}
TIERS: dict[str, dict[str, Any]] = {
    "ram": {},
    "device": {"device_memory": "400KiB"},
    "disk": {"host_memory": "1100KiB"},
}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (2, 24), generator=generator) for _ in range(4)]


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]


def task(build: Any = gpt2, kind: str = "plain", of: Any = loss) -> Task:
    def prepare(model: Any) -> None:
        if kind != "plain":
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": kind == "reentrant"})

    return Task(build, batches(), of, "bf16", lr=1e-3, prepare=prepare)


def case(build: Any, kind: str, tier: str, policy: str) -> Any:
    is_quick = build is gpt2 and tier == "disk" and policy != "offload"
    return pytest.param(build, kind, tier, policy, marks=() if is_quick else pytest.mark.heavy)


KINDS, POLICIES = ("plain", "checkpointed", "reentrant"), ("offload", "recompute", "auto")
CASES = [case(*each) for each in product((gpt2, llama), KINDS, TIERS, POLICIES)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("build", "kind", "tier", "policy"), CASES)
def test_a_policy_gives_the_numbers_of_the_unmanaged_model(
    build: Any, kind: str, tier: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "room_bytes", lambda manager, device: 300_000)
    model = check_parity(task(build, kind), offload_dir=tmp_path, activation_policy=policy, **TIERS[tier], **SIZE)
    if kind == "plain" and policy != "recompute":
        assert model.memory_stats()["activation/leave_count"] > 0


def test_a_cache_that_blocks_are_given_is_not_filled_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        check_parity(
            task(of=lambda model, x: model(input_ids=x, labels=x, use_cache=True).loss), activation_policy="recompute"
        )
    told = [record.message for record in caplog.records if "computed again" in record.message]
    assert len(told) <= 1


def test_what_a_hook_of_the_user_sees_is_seen_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[float] = []

    def watched() -> nn.Module:
        model = gpt2()
        model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
        return model

    with caplog.at_level(logging.WARNING):
        check_parity(task(watched), activation_policy="recompute")
    assert len(seen) == 2 * len(batches())
    assert seen[: len(batches())] == seen[len(batches()) :]
    told = [record.message for record in caplog.records if "computed again" in record.message]
    assert len(told) == 1
    assert "transformer.h.1" in told[0] and "a forward hook of its GPT2MLP would be called again" in told[0]
