"""Direct preference optimisation with TRL's DPOTrainer, its model in chunks.

A tiny model with random weights learns to prefer the next number to any other word; nothing is downloaded. Needs
``pip install 'gemini-memory[integrations]' trl``.
"""

import argparse
import tempfile

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gemini.booster.plugin import GeminiPlugin
from gemini.integrations.hugging_face import GeminiTrainerMixin


class MyDPOTrainer(GeminiTrainerMixin, trl.DPOTrainer):  # the first line that differs from TRL's own example
    pass


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    tokens = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def small_qwen(hidden_size: int) -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=258, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=256, eos_token_id=257, bos_token_id=None,
        )
    )  # fmt: skip


def preferences(length: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"after {i} comes " for i in range(length)],
            "chosen": [str(i + 1) for i in range(length)],
            "rejected": ["nothing"] * length,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--host_memory", help="bytes of RAM for model data, as in 8GiB; the rest goes to disk")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--plain", action="store_true", help="TRL alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, max_steps=options.num_steps, per_device_train_batch_size=4, learning_rate=1e-3,
            max_length=64, logging_steps=1, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused", bf16=options.precision == "bf16", disable_tqdm=True, seed=0,
        )  # fmt: skip
        model = small_qwen(options.hidden_size)
        given = {"ref_model": small_qwen(options.hidden_size), "processing_class": byte_tokenizer()}
        if options.plain:
            trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=preferences(64), **given)
        else:
            disk = {"host_memory": options.host_memory, "offload_dir": folder} if options.host_memory else {}
            plugin = GeminiPlugin(precision=options.precision, telemetry=False, **disk)
            trainer = MyDPOTrainer(
                model=model, args=arguments, train_dataset=preferences(64), gemini_plugin=plugin, **given
            )
        trainer.train()
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']}: loss: {entry['loss']:.7f}, margin {entry['rewards/margins']:.4f}")


if __name__ == "__main__":
    main()
