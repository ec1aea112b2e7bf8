"""Element-wise torch optimizers with options that matter, and the loop of `loop.py` with each of them."""

from typing import Any

import torch
from loop import PLACEMENTS, WIDTH, Trained, batch
from torch import Tensor, nn

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD of Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"weight_decay": 0.1}),
    "RMSprop with all": (torch.optim.RMSprop, {"lr": 1e-4, "momentum": 0.9, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "NAdam decoupled": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "NAdam foreach": (torch.optim.NAdam, {"weight_decay": 0.1, "foreach": True}),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.1, "t0": 2, "lambd": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "Rprop foreach": (torch.optim.Rprop, {"foreach": True}),
}
ELEMENTWISE = [name for name in OPTIMIZERS if name != "Adafactor"]

OTHER_PLACEMENTS = {
    "resident": {},
    "streamed": {**PLACEMENTS["streamed"], "device_memory": "160KiB"},
    "disk": {**PLACEMENTS["disk"], "host_memory": "640KiB"},
}


def build() -> nn.Module:
    """Large enough to need the disk beside its staging, also with plain SGD, which keeps least."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, 255), nn.GELU(), nn.Linear(255, WIDTH), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))


def make(name: str, parameters: Any, **options: Any) -> Any:
    cls, of_name = OPTIMIZERS[name]
    return cls(parameters, **{"lr": 1e-2, **of_name, **options})


def groups(parameters: list[Any]) -> list[dict[str, Any]]:
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.05}]


class Other(Trained):
    """The same loop, two parameter groups, another optimizer."""

    def __init__(self, name: str, placement: dict[str, Any] | None, precision: str = "fp32", **plugin: Any) -> None:
        self.name = name
        super().__init__(placement, precision, **plugin)

    def build_model(self) -> nn.Module:
        return build()

    def make_optimizer(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        return make(self.name, groups(parameters))

    def loss(self, step: int) -> Tensor:
        torch.manual_seed(step)  # dropout; runs take turns
        return super().loss(step)


class LowPrecision:
    """Plain torch with masters by hand: the optimizer has fp32 copies, the model computes with them rounded."""

    def __init__(self, name: str, dtype: torch.dtype, loss_scale: float = 1.0, max_norm: float = 0.0) -> None:
        self.model = build().to(dtype)
        self.masters = [nn.Parameter(p.detach().float()) for p in build().parameters()]
        self.optimizer = make(name, groups(self.masters))
        self.dtype, self.loss_scale, self.max_norm = dtype, loss_scale, max_norm

    def step(self, number: int) -> float:
        torch.manual_seed(number)
        loss = self.model(batch(number).to(self.dtype)).square().mean()
        (loss * self.loss_scale).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        factor = 1.0 / self.loss_scale
        if self.max_norm:
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
            norm = torch.linalg.vector_norm(norms) / self.loss_scale
            factor *= float((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float() * factor
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
                parameter.copy_(master)
                parameter.grad = None
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.model.named_parameters()]
        return {name: master.detach() for name, master in zip(names, self.masters, strict=True)}
