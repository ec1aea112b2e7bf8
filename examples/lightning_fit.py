"""Train with Lightning: the strategy is ours, and the LightningModule is as it was.

python examples/lightning_fit.py
python examples/lightning_fit.py --host-memory 6MiB
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from reference_text import ByteWindows
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from gemini.booster.plugin import GeminiPlugin
from gemini.integrations.lightning import GeminiStrategy

CONFIG = GPT2Config(
    vocab_size=ByteWindows.vocab_size, n_positions=64, n_embd=128, n_layer=2, n_head=4, use_cache=False,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = GPT2LMHeadModel(CONFIG)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss = self.net(**batch).loss
        print(f"step {number + 1} loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", help='bound on the model data in RAM, such as "6MiB"; the rest is on disk')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    lightning.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        plugin = GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder)
        trainer = lightning.Trainer(
            strategy=GeminiStrategy(plugin, module="net"), accelerator="cpu", max_epochs=1, gradient_clip_val=1.0,
            default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(LanguageModel(), DataLoader(ByteWindows(160, 64), batch_size=8, num_workers=0))


if __name__ == "__main__":
    main()
