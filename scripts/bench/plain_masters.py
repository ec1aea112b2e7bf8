"""Plain PyTorch as one writes mixed precision by hand: the model in bf16, AdamW on fp32 masters."""

from typing import Any

import torch


class Masters:
    """The masters of a model, which is in bf16 from here on."""

    def __init__(self, model: Any, rate: float) -> None:
        self._model = model
        self._masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        model.to(torch.bfloat16)
        self._optimizer = torch.optim.AdamW(self._masters, lr=rate, fused=True)

    def update(self) -> None:
        """One step by the model's gradients, which are freed."""
        pairs = list(zip(self._masters, self._model.parameters(), strict=True))
        for master, parameter in pairs:
            master.grad, parameter.grad = parameter.grad.float(), None
        self._optimizer.step()
        with torch.no_grad():
            for master, parameter in pairs:
                parameter.copy_(master)
                master.grad = None
