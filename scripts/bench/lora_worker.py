"""Trains adapters of peft on one GPT2; `lora.py` starts it and asks it for turns, as it does `offload_worker.py`."""

from collections.abc import Callable
from typing import Any

import torch
from offload_worker import MANAGERS, main
from ranks_worker import RATE, Batch, Trainer


def _config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0, fan_in_fan_out=True)


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Plain(Trainer):
    """peft and torch's AdamW; the base in bf16, adapters in fp32."""

    def __init__(self, build: Callable[[], Any], rank: int, accelerate: bool = False) -> None:
        from peft import get_peft_model

        self.model = get_peft_model(build().to(torch.bfloat16), _config(rank))
        self.optimizer = torch.optim.AdamW(_trainable(self.model), lr=RATE, fused=True)
        self._backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
        if accelerate:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=True)
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
            self._backward = accelerator.backward

    def backward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self._backward(loss)
        return loss


class Ours(Trainer):
    """The same adapters, with the base where the plugin's arguments have it."""

    def __init__(self, build: Callable[[], Any], rank: int, quantize: str | None = None, **plugin: Any) -> None:
        from gemini.booster import Booster
        from gemini.booster.plugin import GeminiPlugin

        self.booster = Booster(plugin=GeminiPlugin(precision="keep", telemetry=False, **plugin))
        # Not lazy, so that the adapters begin with the same numbers as in the plain run.
        model = self.booster.enable_lora(
            build().to(torch.bfloat16), lora_config=_config(rank), **({"quantize": quantize} if quantize else {})
        )
        optimizer: Any = torch.optim.AdamW(_trainable(model), lr=RATE, fused=True)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    def backward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.booster.backward(loss, self.optimizer)
        return loss

    def finish(self) -> None:
        list(self.model.named_parameters())


MANAGERS |= {"peft": ("peft", Plain), "our lora": ("gemini.booster.plugin", Ours)}

if __name__ == "__main__":
    main()
