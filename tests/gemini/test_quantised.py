"""A base in four or eight bits: adapters beside it train as beside weights that were dequantised by hand."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import Task, check_equal, run_managed, run_plain
from torch import nn

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import ABSMAX
from gemini.nn.optimizer import HybridAdam
from gemini.stat.cli import main

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


QUICK = {("streamed", "nf4"), ("disk", "int8")}
CASES = [
    pytest.param(placement, quantize, marks=() if (placement, quantize) in QUICK else pytest.mark.heavy)
    for placement in PLACEMENTS
    for quantize in ("nf4", "int8")
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("placement", "quantize"), CASES)
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


@pytest.mark.parametrize("placement", [pytest.param("host", marks=pytest.mark.heavy), "streamed"])
def test_with_activation_checkpointing_too(build: Any, precision: str, placement: str) -> None:
    check(task(build, precision, prepare=checkpointing), "nf4", **PLACEMENTS[placement])


# -- which weights, and what is said of others


def managed(build: Callable[[], nn.Module] = llama, **plugin: Any) -> tuple[Any, Any, Booster]:
    torch.manual_seed(0)
    model = build()
    booster = Booster(plugin=GeminiPlugin(**{"precision": "fp32", "telemetry": False, "quantize": "nf4"} | plugin))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = HybridAdam(adapters, lr=1e-2) if adapters else None
    return (*booster.boost(model, optimizer)[:2], booster)


def quantised_names(model: Any) -> set[str]:
    manager = boosted(model).manager
    places = {name: manager.find(parameter) for name, parameter in model.named_parameters()}
    return {name for name, place in places.items() if place is not None and ABSMAX in place[0].homes}


def weight_of(model: Any) -> Any:
    return dict(model.named_parameters())["base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"]


def test_nf4_takes_no_more_than_0_6_bytes_a_parameter_and_int8_1_1() -> None:
    for quantize, bound in (("nf4", 0.6), ("int8", 1.1)):
        model, *_ = managed(quantize=quantize)
        chunks = [chunk for chunk in boosted(model).manager.chunks if ABSMAX in chunk.homes]
        numel = sum(slot.numel for chunk in chunks for slot in chunk.layout.slots)
        assert sum(home.nbytes for chunk in chunks for home in chunk.homes.values()) <= bound * numel


def test_enable_lora_says_how_boost_keeps_the_base() -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["k_proj"])
    model: Any = booster.enable_lora(base, lora_config=config, quantize=gemini.Quantization(skip=("mlp",)))
    model, *_ = booster.boost(model, HybridAdam([p for p in model.parameters() if p.requires_grad]))
    assert {name.removeprefix("base_model.model.model.layers.0.") for name in quantised_names(model)} == {
        "self_attn.q_proj.base_layer.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    }


def test_a_bitsandbytes_config_says_it_too_and_another_form_is_refused() -> None:
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    for asked, found in (({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"), ({}, None)):
        config = SimpleNamespace(**asked)
        model = booster.enable_lora(
            nn.Sequential(nn.Linear(2, 2)), None, peft.LoraConfig(target_modules=["0"]), bnb_quantization_config=config
        )
        said = gemini.Quantization.for_model(model, None)
        assert (said and said.format) == found
    with pytest.raises(ValueError, match=r"asks for LLM\.int8, and known are 4 bits of the type 'nf4': give quantize="):
        booster.enable_lora(nn.Linear(2, 2), bnb_quantization_config=SimpleNamespace(load_in_8bit=True))


@pytest.mark.parametrize(
    ("quantize", "error", "message"),
    [
        ("fp4", ValueError, "quantize must be 'nf4', 'int8', a .*, got 'fp4'"),
        (4, TypeError, r"quantize must be 'nf4', 'int8', a gemini\.Quantization, .*, got 4 of type int"),
    ],
)
def test_an_unknown_form_is_an_error(quantize: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GeminiPlugin(quantize=quantize)


def test_weights_that_train_are_not_quantised() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, quantize="int8"))
    with pytest.raises(ValueError, match="all 2 weights of linear layers train: train adapters beside them"):
        booster.boost(model, HybridAdam(model.parameters()))
    model[0].requires_grad_(False)
    model, *_ = booster.boost(model, HybridAdam(model.parameters()))
    assert quantised_names(model) == {"0.weight"}


def test_a_quantised_weight_cannot_be_unfrozen() -> None:
    model, optimizer, booster = managed()
    weight = weight_of(model)
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight is kept in fewer bits .* cannot be trained"):
        optimizer.add_param_group({"params": [weight]})
    weight.requires_grad_(False)
    train(model, optimizer, booster)


def train(model: Any, optimizer: Any, booster: Booster) -> float:
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    value = loss(model, tokens)
    booster.backward(value, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


# -- changing values


def scaled(weight: Any) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def through_data(weight: Any) -> None:
    weight.data.mul_(2.0)
    weight.sum()


def through_data_alone(weight: Any) -> None:
    weight.data.mul_(2.0)


def assigned(weight: Any) -> None:
    weight.data = torch.zeros_like(weight)


def as_peft_merges(weight: Any) -> None:
    weight.data += 1.0


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        *[(change, "when it is read") for change in (scaled, through_data, assigned, as_peft_merges)],
        *[(change, "by the next forward") for change in (through_data_alone, as_peft_merges)],
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("placement", ["host", "streamed"])
def test_a_change_of_a_quantised_weight_is_refused_and_undone(
    change: Callable[[Any], None], seen: str, placement: str
) -> None:
    model, optimizer, booster = managed(**PLACEMENTS[placement])
    train(model, optimizer, booster)
    weight = weight_of(model)
    before = weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"q_proj\.base_layer\.weight would be changed, .* do it after gemini\.to_torch"
    ):
        change(weight)
        if seen == "when it is read":
            model.state_dict()
        else:
            train(model, optimizer, booster)
    assert torch.equal(weight, before)
    weight.data = before.clone()  # what it has already
    train(model, optimizer, booster)
    assert torch.equal(weight, before)


def test_merging_is_refused_and_done_in_the_plain_model() -> None:
    model, optimizer, booster = managed()
    train(model, optimizer, booster)
    before = weight_of(model).detach().clone()
    for safe_merge in (False, True):
        with pytest.raises(ValueError, match=r"do it after gemini\.to_torch\(model\)"):
            model.merge_adapter(safe_merge=safe_merge)
            model.state_dict()
        assert torch.equal(weight_of(model), before)
    plain = gemini.to_torch(model)
    assert torch.equal(weight_of(plain), before)
    plain.merge_adapter()
    assert not torch.equal(weight_of(plain), before)


def test_loading_replaces_values_by_rounded_ones() -> None:
    model, optimizer, booster = managed()
    train(model, optimizer, booster)
    lent = weight_of(model).data  # keeps its full copy
    other = llama().state_dict()
    model.load_state_dict(other)
    name = next(name for name in quantised_names(model) if "layers.1.self_attn.q_proj" in name)
    assert torch.equal(model.state_dict()[name], gemini.Quantization("nf4").rounded(other[name]))
    assert torch.equal(lent, model.state_dict()[name])


def test_what_is_saved_has_the_values_and_loads_into_the_same_codes(tmp_path: Any) -> None:
    for precision in ("fp32", "bf16"):
        base = partly_frozen().requires_grad_(False)
        model, _, booster = managed(lambda base=base: base, precision=precision)  # type: ignore[misc]
        booster.save_model(model, str(tmp_path))
        plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
        again, *_ = managed(partly_frozen, precision=precision)
        booster.load_model(again, str(tmp_path))
        assert quantised_names(model) == quantised_names(again)
        values, loaded, found = model.state_dict(), plain.state_dict(), again.state_dict()
        for name in quantised_names(model):
            assert values[name].dtype is (torch.float32 if precision == "fp32" else torch.bfloat16)
            assert torch.equal(values[name], loaded[name]) and torch.equal(values[name], found[name])


def test_a_released_model_has_the_same_codes_again(tmp_path: Any) -> None:
    model, _, booster = managed()
    before = weight_of(model).detach().clone()
    booster.release(model, tmp_path)
    booster.resume(model)
    assert torch.equal(weight_of(model), before)


# -- numbers about it


def test_statistics_count_the_bytes_of_codes_and_scales() -> None:
    dense, quantised = (managed(quantize=quantize)[0].memory_stats() for quantize in (None, "nf4"))
    model, *_ = managed()
    chunks = [chunk for chunk in boosted(model).manager.chunks if ABSMAX in chunk.homes]
    numel = sum(chunk.layout.numel for chunk in chunks)
    nbytes = sum(home.nbytes for chunk in chunks for home in chunk.homes.values())
    saved = dense["model_data/parameter_bytes"] - quantised["model_data/parameter_bytes"]
    assert abs(saved - (4 * numel - nbytes)) < 0.02 * 4 * numel  # chunks end elsewhere
    assert quantised["model_data/optimizer_bytes"] == dense["model_data/optimizer_bytes"]
    assert "host" in model.memory_summary()


def partly_frozen() -> nn.Module:
    """A model whose layers are frozen (adapters of peft cannot be made on the tensors that estimates run on)."""
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.h.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def test_the_estimate_packs_as_boost_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantised_model", sys.modules[__name__])
    masters = {}
    for quantize in ((), ("--quantize", "nf4")):
        main(["estimate", "quantised_model:partly_frozen", "--ram", "4GiB", "-s", "24", "--json", *quantize])
        answer = json.loads(capsys.readouterr().out)
        masters[quantize] = answer["terms"]["masters"]
    assert 'quantize="nf4"' in answer["arguments"]
    model, *_ = managed(partly_frozen, precision="bf16")
    assert masters[("--quantize", "nf4")] == model.memory_stats()["model_data/parameter_bytes"] < masters[()]
    assert main(["estimate", "gpt2", "--quantize", "nf4", "--set", "n_layer=1"]) == 2
    assert "weights of linear layers train" in capsys.readouterr().err
