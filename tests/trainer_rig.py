"""transformers' Trainer on a tiny GPT, with and without management, for tests of the adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from gemini.booster.plugin import GeminiPlugin
from gemini.integrations.hugging_face import GeminiTrainerMixin

PARAMETER_BYTES = 4 * 28_000  # fp32, of the model below, about
PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "streamed": {"device_memory": "128KiB", "host_memory": "1GiB", "chunk_config_dict": {1: {"chunk_size": 4096}}},
    "disk": {"host_memory": 11 * PARAMETER_BYTES // 4, "chunk_config_dict": {1: {"chunk_size": 4096}}},
}
"""On disk there are gradients, too, so ``p.grad`` cannot be read."""


class Tokens(Dataset[Any]):
    def __init__(self, length: int = 16) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class TokensOneByOne(IterableDataset[Any]):
    """The same without a length."""

    def __init__(self, length: int) -> None:
        self.tokens = Tokens(length)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.tokens[index] for index in range(len(self.tokens)))


class ManagedTrainer(GeminiTrainerMixin, transformers.Trainer):  # type: ignore[misc, name-defined]
    pass


def model(layers: int = 2) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=layers, n_embd=32, n_head=2, vocab_size=64, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def arguments(folder: Path, **changes: Any) -> Any:
    fixed = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 4,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "max_grad_norm": 0.0, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3,
        "optim": "adamw_torch_fused",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**fixed, **changes})


class Maker:
    """Makes plain trainers (``place`` None) or managed ones."""

    def __init__(self, place: str | None, folder: Path, **plugin: Any) -> None:
        self.place = place
        self.folder = folder
        self._plugin = plugin

    def plugin(self) -> GeminiPlugin:
        assert self.place is not None
        folder = {"offload_dir": self.folder, "disk_memory": "100MiB"} if self.place == "disk" else {}
        fixed = {"precision": "fp32", "telemetry": False}
        return GeminiPlugin(**{**fixed, **PLACES[self.place], **folder, **self._plugin})

    def trainer(self, of: Any, args: Any = None, **options: Any) -> Any:
        options = {"args": args or arguments(self.folder), "train_dataset": Tokens(), **options}
        if self.place is None:
            return transformers.Trainer(model=of, **options)
        return ManagedTrainer(model=of, gemini_plugin=self.plugin(), **options)


def logged(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]


def differing(ours: Any, theirs: Any) -> list[str]:
    """Names of the weights that are not equal."""
    expected = theirs.state_dict()
    return [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])]
