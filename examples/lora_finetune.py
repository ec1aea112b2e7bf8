"""Fine-tune LoRA adapters on a frozen base, in bfloat16 or in 4 bits (QLoRA), with the base partly on disk.

python examples/lora_finetune.py
python examples/lora_finetune.py --quantize nf4
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from peft import LoraConfig
from reference_text import ByteWindows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gemini

CONFIG = LlamaConfig(
    vocab_size=ByteWindows.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, use_cache=False,
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantize", choices=("nf4", "int8"), help="keep the base in 4 or 8 bits a parameter")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(f"{folder}/base")  # stands for a model of the hub

        plugin = gemini.GeminiPlugin(precision="keep", host_memory="4MiB", offload_dir=folder)
        booster = gemini.Booster(plugin=plugin)
        with gemini.LazyInitContext():  # reads nothing yet, however large the files are
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
        lora = LoraConfig(r=8, target_modules="all-linear")
        model = booster.enable_lora(model, lora_config=lora, quantize=options.quantize)
        optimizer = gemini.HybridAdam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        model, optimizer, *_ = booster.boost(model, optimizer)

        batches = DataLoader(ByteWindows(40, 128), batch_size=4)
        for step, batch in enumerate(batches, start=1):
            loss = model(**batch).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step} loss {loss.item():.4f}")
        stats = model.memory_stats()
        print(f"base and adapters: at most {stats['host/peak_bytes'] / 2**20:.0f} MiB of RAM")
        booster.save_lora_as_pretrained(model, f"{folder}/adapters", use_safetensors=True)


if __name__ == "__main__":
    main()
