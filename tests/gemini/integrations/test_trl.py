"""TRL's trainers with our mixin, and over a boosted model, are TRL's alone: SFT, DPO and GRPO.

TRL brings pyarrow and pandas, 270 MB, and is not among the packages that the tests install.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from trainer_rig import differing  # noqa: E402

from gemini.booster import Booster  # noqa: E402
from gemini.booster.plugin import GeminiPlugin  # noqa: E402
from gemini.integrations.hugging_face import GeminiTrainerMixin  # noqa: E402

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # libraries' own warnings
]

SMALL = {"chunk_config_dict": {1: {"chunk_size": 8192}}}
PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "streamed": {"device_memory": "256KiB", "host_memory": "1GiB", **SMALL},
    "disk": {"host_memory": "420KiB", "disk_memory": "100MiB", **SMALL},
}
NUMBERS = range(16)


def tokenizer() -> Any:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    tokens = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def pretrained(folder: Path) -> Any:
    """From a folder, as TRL loads a reference model from where the model came from."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=256,
            eos_token_id=257, bos_token_id=None,
        )  # fmt: skip
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return transformers.Qwen2ForCausalLM.from_pretrained(folder)


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou " for letter in text) / (1 + len(text)) for text in completions]


def rows(**columns: Callable[[int], str]) -> Any:
    return datasets.Dataset.from_dict({name: [of(i) for i in NUMBERS] for name, of in columns.items()})


TEXTS = rows(text=lambda i: f"the number {i} is followed by {i + 1}")
PAIRS = rows(prompt=lambda i: f"after {i} comes ", chosen=lambda i: str(i + 1), rejected=lambda i: "nothing")
PROMPTS = rows(prompt=lambda i: f"after {i} comes ")
KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {"max_length": 64}, {"train_dataset": TEXTS}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"max_length": 64}, {"train_dataset": PAIRS}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"max_completion_length": 8, "num_generations": 4, "beta": 0.1},
        {"train_dataset": PROMPTS, "reward_funcs": vowels},
    ),
}


def trained(kind: str, how: str, place: str, folder: Path, changes: dict[str, Any], has_lora: bool = False) -> Any:
    base, configuration, own, given = KINDS[kind]
    fixed = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "seed": 3,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "bf16": False,
    }  # fmt: skip
    options: dict[str, Any] = {"args": configuration(**{**fixed, **own, **changes}), **given}
    options["processing_class"] = tokenizer()
    if has_lora:
        options["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = pretrained(folder / "model")
    disk = {"offload_dir": folder} if place == "disk" else {}
    plugin = GeminiPlugin(precision="fp32", telemetry=False, **PLACES[place], **disk)
    if how == "mixin":
        base, options["gemini_plugin"] = type("Managed", (GeminiTrainerMixin, base), {}), plugin
    elif how == "boosted":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
        options["optimizers"] = (optimizer, None)
    torch.manual_seed(1)  # for adapters
    trainer = base(model=model, **options)
    trainer.train()
    return trainer


def check_equal(kind: str, how: str, place: str, folder: Path, has_lora: bool = False, **changes: Any) -> None:
    plain = trained(kind, "plain", place, folder, changes, has_lora)
    ours = trained(kind, how, place, folder, changes, has_lora)
    logs = []
    for trainer in (plain, ours):
        entries = trainer.state.log_history
        logs.append([{k: v for k, v in entry.items() if "time" not in k and "second" not in k} for entry in entries])
        assert [entry for entry in entries if "loss" in entry]
    assert logs[1] == logs[0]
    assert not differing(ours.model, plain.model)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["mixin", "boosted"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_trl_alone(kind: str, how: str, place: str, tmp_path: Path) -> None:
    check_equal(kind, how, place, tmp_path)


@pytest.mark.parametrize("place", ["streamed", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_as_by_trl_alone(kind: str, place: str, tmp_path: Path) -> None:
    check_equal(kind, "mixin", place, tmp_path, has_lora=True)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {"packing": True}),
        ("sft", {"bf16": True}),
        ("sft", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "gradient_checkpointing": False}),
        ("grpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ("grpo", {"num_iterations": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_uses_are_those_of_trl_alone(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_equal(kind, "mixin", "disk", tmp_path, **changes)


def test_a_reference_model_may_be_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, configuration, own, given = KINDS["dpo"]
    reference = pretrained(tmp_path / "model")
    plugin = GeminiPlugin(precision="fp32", telemetry=False, **PLACES["streamed"])
    reference, *_ = Booster(plugin=plugin).boost(reference)
    monkeypatch.setitem(KINDS, "in chunks", (base, configuration, own, {**given, "ref_model": reference}))
    plain = trained("dpo", "plain", "default", tmp_path, {})
    ours = trained("in chunks", "mixin", "streamed", tmp_path, {})
    assert not differing(ours.model, plain.model)
