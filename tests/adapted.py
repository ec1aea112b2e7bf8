"""A small Llama with adapters of peft: one program, run with management and without, to be compared bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

_SMALL = {"chunk_config_dict": {1: {"chunk_size": 4096}}}
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "device": {"device_memory": "200KiB", "host_memory": "64MiB", **_SMALL},
    "disk": {"host_memory": "1400KiB", "offload_dir": ".", **_SMALL},
}
"""All in RAM; full copies on an emulated accelerator that come and go; homes and adapters' states on disk."""

VOCABULARY = 96
Loss = Callable[[Any, Tensor], Tensor]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def config(**options: Any) -> Any:
    from peft import LoraConfig

    usual = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}
    return LoraConfig(**{**usual, "init_lora_weights": False, **options})


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(step))


def usual_loss(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]


class Run:
    """One run of a program.

    Parameters
    ----------
    place
        A key of `PLACES`; None: without management.
    precision
        ``"keep"``: the base is in bfloat16, and peft makes adapters in float32.
    folder
        For the files of this run.
    """

    def __init__(self, place: str | None, precision: str, folder: Path) -> None:
        self.is_managed = place is not None
        self.dtype = torch.bfloat16 if precision == "keep" else torch.float32
        self.folder = folder
        self.seen: dict[str, Tensor] = {}
        """What has to be equal."""
        options = {**PLACES[place or "resident"]}
        if "offload_dir" in options:
            options["offload_dir"] = folder
        self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **options))
        self._steps = 0

    def base(self) -> Any:
        return llama(self.dtype)

    def adapted(self, *given: Any, base: Any = None) -> Any:
        from peft import get_peft_model

        torch.manual_seed(1)
        return get_peft_model(self.base() if base is None else base, *given)

    def boost(self, model: Any) -> tuple[Any, Any]:
        optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        if self.is_managed:
            model, optimizer, *_ = self.booster.boost(model, optimizer)
        return model, optimizer

    def train(self, model: Any, optimizer: Any, steps: int = 2, loss_of: Loss = usual_loss) -> None:
        for _ in range(steps):
            self._steps += 1
            torch.manual_seed(self._steps)
            loss = loss_of(model, tokens(self._steps))
            if self.is_managed:
                self.booster.backward(loss, optimizer)
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.seen[f"loss {self._steps}"] = loss.detach().clone()

    def see_logits(self, name: str, model: Any) -> None:
        model.eval()
        with torch.no_grad():
            self.seen[name] = model(input_ids=tokens(0)).logits.clone()
        model.train()

    def see_weights(self, model: Any, name: str = "weights") -> None:
        for key, value in model.state_dict().items():
            self.seen[f"{name} {key}"] = value.detach().clone()


def check(program: Callable[[Run], None], place: str, precision: str, folder: Path) -> None:
    """A program sees the same values with management as without."""
    ours, plain = Run(place, precision, folder / "ours"), Run(None, precision, folder / "plain")
    for run in (ours, plain):
        run.folder.mkdir()
        program(run)
    assert ours.seen.keys() == plain.seen.keys()
    # For parameters that train in bfloat16 our state dict has the masters, a plain one their rounded values.
    assert not [name for name, value in plain.seen.items() if not torch.equal(ours.seen[name].to(value.dtype), value)]
