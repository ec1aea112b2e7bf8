"""Placement never changes numbers: the transformers models of the contract, over every kind of placement."""

from typing import Any

import pytest
import torch
from parity import Task, check_equal, check_parity, run_managed, run_plain, tightest, torch_fused
from torch import nn

transformers = pytest.importorskip("transformers")

VOCAB = 256


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def batches(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (2, 24), generator=generator) for _ in range(count)]


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]


def checkpointing(use_reentrant: bool | None) -> Any:
    def prepare(model: Any) -> None:
        if use_reentrant is not None:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )  # its old name
            enable({"use_reentrant": use_reentrant})

    return prepare


def task(build: Any, precision: str, use_reentrant: bool | None = None) -> Task:
    return Task(build, batches(), loss, precision, lr=1e-3, prepare=checkpointing(use_reentrant))


def size(numel: int) -> dict[str, Any]:
    return {"chunk_config_dict": {1: {"chunk_size": numel}}}


PLACEMENTS: dict[str, dict[str, Any]] = {
    "everything resident": {},
    "chunks of 2^12 elements": size(1 << 12),
    "chunks of 2^16 elements": size(1 << 16),
    "everything on an emulated device": {"device_memory": "64MiB"},
    "half of the states on an emulated device": {"device_memory": "1MiB"},
    "no prefetch": {"device_memory": "600KiB", "max_prefetch": 0, **size(1 << 14)},
    "static policy": {"device_memory": "8MiB", "placement_policy": "static", "offload_optim_frac": 0.5},
}


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def build(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_placement_gives_the_numbers_of_the_unmanaged_model(
    build: Any, precision: str, placement: dict[str, Any]
) -> None:
    check_parity(task(build, precision), **placement)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("chunk_numel", [1 << 12, 1 << 16])
def test_a_device_of_two_chunks_gives_the_same_numbers(
    build: Any, precision: str, use_reentrant: bool | None, chunk_numel: int
) -> None:
    itemsize = 4 if precision == "fp32" else 2
    # With chunks of 2^12 elements most tensors are larger than a chunk and have one of their own: two of the largest.
    largest = max(chunk_numel, VOCAB * 64)
    model = check_parity(
        task(build, precision, use_reentrant), device_memory=2 * largest * itemsize, **size(chunk_numel)
    )
    assert model.memory_stats()["move/evict_count"] > 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_host_and_disk_alone_give_the_same_numbers(
    build: Any, precision: str, use_reentrant: bool | None, tmp_path: Any
) -> None:
    model = check_parity(
        task(build, precision, use_reentrant), host_memory="1100KiB", offload_dir=tmp_path, **size(1 << 14)
    )
    stats = model.memory_stats()
    assert stats["disk/used_bytes"] > stats["host/used_bytes"] > 0
    assert stats["move/disk_read_bytes"] > 0


def test_device_host_and_disk_together_give_the_same_numbers(build: Any, precision: str, tmp_path: Any) -> None:
    model = check_parity(
        task(build, precision), device_memory="700KiB", host_memory="900KiB", offload_dir=tmp_path, **size(1 << 14)
    )
    stats = model.memory_stats()
    assert min(stats[f"{tier}/used_bytes"] for tier in ("device", "host", "disk")) > 0


@pytest.mark.parametrize("placement", [{}, {"device_memory": "600KiB", **size(1 << 14)}], ids=["resident", "streamed"])
def test_a_lazy_start_gives_the_same_numbers_as_an_eager_one(build: Any, placement: dict[str, Any]) -> None:
    check_parity(task(build, "fp32"), lazy=True, **placement)


def test_a_lazy_bf16_start_equals_an_eager_one(build: Any, tmp_path: Any) -> None:
    # No rounding of the initial values here: masters start from the fp32 ones, however the model was built.
    bf16 = task(build, "bf16")
    lazy, _ = run_managed(bf16, lazy=True, host_memory="1100KiB", offload_dir=tmp_path)
    resident, _ = run_managed(bf16, lazy=True)
    check_equal(lazy, resident)


def test_fp32_equals_plain_pytorch_with_its_fused_adamw(build: Any) -> None:
    fp32 = task(build, "fp32")
    plain = run_plain(fp32, torch_fused)
    check_equal(run_managed(fp32)[0], plain)
    check_equal(run_managed(fp32, device_memory="600KiB", **size(1 << 14))[0], plain)


def test_the_smallest_device_that_the_errors_lead_to_gives_the_same_numbers(build: Any) -> None:
    fp32 = task(build, "fp32")
    capacity = tightest(fp32, "device", **size(1 << 12))
    model = check_parity(fp32, device_memory=capacity, **size(1 << 12))
    assert model.memory_stats()["device/peak_bytes"] <= capacity
