"""Train with transformers' own Trainer: a class with the mixin, and the plugin as an argument.

python examples/hf_trainer.py
python examples/hf_trainer.py --host-memory 6MiB
"""

import argparse
import tempfile
from collections.abc import Sequence

import transformers
from reference_text import ByteWindows
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from gemini.booster.plugin import GeminiPlugin
from gemini.integrations.hugging_face import GeminiTrainerMixin

CONFIG = GPT2Config(
    vocab_size=ByteWindows.vocab_size, n_positions=64, n_embd=128, n_layer=2, n_head=4, use_cache=False,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Trainer(GeminiTrainerMixin, transformers.Trainer):
    """transformers' Trainer, whose model lives in chunks."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", help='bound on the model data in RAM, such as "6MiB"; the rest is on disk')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments_of_trainer = TrainingArguments(
            output_dir=folder, max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=4,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = Trainer(
            model=GPT2LMHeadModel(CONFIG),
            args=arguments_of_trainer,
            train_dataset=ByteWindows(160, 64),
            eval_dataset=ByteWindows(16, 64),
            gemini_plugin=GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder),
        )
        trainer.remove_callback(transformers.PrinterCallback)  # shows times, too
        trainer.train()
        for record in trainer.state.log_history:
            if "loss" in record:
                print(f"step {record['step']} loss {float(record['loss']):.4f}")
        print(f"eval loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
