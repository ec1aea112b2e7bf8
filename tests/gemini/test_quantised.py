"""A base in four or eight bits: adapters beside it train as beside weights that were dequantised by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import Task, check_equal, run_managed, run_plain
from torch import nn

import gemini
from gemini.boosted import boosted
from gemini.chunk import ABSMAX

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own, about each other
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB = 1024
SMALL = {"chunk_config_dict": {1: {"chunk_size": 1 << 14}}}


def gpt2() -> nn.Module:
    """Its layers are ``Conv1D``, whose weights lie transposed; its output layer is tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    adapters = peft.LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn"], lora_dropout=0.1)
    return peft.get_peft_model(model, adapters)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    """Rows of 60 elements, so that blocks do not end with them, and one layer whose last block is shorter."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=60,
        intermediate_size=126,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    return peft.get_peft_model(model, adapters)  # type: ignore[no-any-return]


def is_quantised(name: str, parameter: nn.Parameter) -> bool:
    return (".h." in name or ".layers." in name) and parameter.dim() == 2 and "lora_" not in name


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]


def checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def task(build: Callable[[], nn.Module], precision: str, **more: Any) -> Task:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, VOCAB, (2, 24), generator=generator) for _ in range(4)]
    return Task(build, tokens, loss, precision, lr=1e-2, **more)


def by_hand(given: Task, quantize: str) -> Task:
    """The same with base weights that are replaced by ``dequantise(quantise(w))``."""

    def build() -> nn.Module:
        model = given.build()
        for name, parameter in model.named_parameters():
            if is_quantised(name, parameter):
                weight = parameter.to(given.dtype)  # what the managed run starts with
                parameter.data = gemini.Quantization(quantize).rounded(weight, given.dtype)
        return model

    return replace(given, build=build)


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def build(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(given: Task, quantize: str, **plugin: Any) -> Any:
    run, model = run_managed(given, quantize=quantize, **plugin)
    check_equal(run, run_plain(by_hand(given, quantize)))
    manager = boosted(model).manager
    for name, parameter in model.named_parameters():
        place = manager.find(parameter)
        assert place is not None
        assert (ABSMAX in place[0].homes) == is_quantised(name, parameter), name
    return model


PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {},
    "an emulated device": {"device_memory": "64MiB"},
    "streamed": {"device_memory": "300KiB", **SMALL},
    "host and disk": {"host_memory": "540KiB", **SMALL},
    "disk": {"device_memory": "270KiB", "host_memory": "280KiB", **SMALL},
}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_adapters_train_as_beside_weights_dequantised_by_hand(
    build: Any, precision: str, placement: str, quantize: str, tmp_path: Any
) -> None:
    plugin = dict(PLACEMENTS[placement])
    if "disk" in placement:
        plugin["offload_dir"] = tmp_path
        half = precision == "bf16"
        plugin |= {"device_memory": "130KiB"} if placement == "disk" and half else {}
        plugin |= {"host_memory": "410KiB"} if placement == "host and disk" and half else {}
    model = check(task(build, precision), quantize, **plugin)
    if placement == "disk":
        assert model.memory_stats()["disk/used_bytes"] > 0


@pytest.mark.parametrize("placement", ["host", "streamed"])
def test_with_activation_checkpointing_too(build: Any, precision: str, placement: str) -> None:
    check(task(build, precision, prepare=checkpointing), "nf4", **PLACEMENTS[placement])
