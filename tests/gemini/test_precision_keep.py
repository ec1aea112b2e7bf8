"""``precision="keep"``: each parameter computes in its own dtype, as in plain PyTorch."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, WIDTH, Trained, check_same
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam


class Adapted(nn.Module):
    """A layer in bfloat16 and one of small rank in float32 beside it, as peft adds them."""

    def __init__(self, trains_base: bool) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).bfloat16().requires_grad_(trains_base)
        self.norm = nn.BatchNorm1d(WIDTH).bfloat16()
        self.low, self.high = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.high(self.low(x.float()))
        mixed: Tensor = self.norm(self.base(x) + added.bfloat16())
        return torch.nn.functional.gelu(mixed)


class Mixed(Trained):
    trains_base = False

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[Adapted(self.trains_base) for _ in range(5)])

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        out: Tensor = self.model(torch.randn(8, WIDTH, generator=generator).bfloat16())
        return out.float().square().mean()

    def weights(self) -> dict[str, Tensor]:
        if self.is_managed:
            return super().weights()
        # A plain parameter in bfloat16 shows its rounded value; the optimizer has its master.
        named = self.model.named_parameters()
        return {name: self.optimizer.state.get(p, {}).get("master", p).detach().clone() for name, p in named}


class MixedAndTrained(Mixed):
    trains_base = True


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [Mixed, MixedAndTrained])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_model_of_two_dtypes_trains_as_in_plain_pytorch(place: str, kind: type[Mixed]) -> None:
    ours, plain = kind({**PLACEMENTS[place]}, precision="keep"), kind(None)
    assert [ours.step(i) for i in range(3)] == [plain.step(i) for i in range(3)]
    check_same(ours, plain)
    for name, parameter in ours.model.named_parameters():
        assert parameter.dtype is plain.model.get_parameter(name).dtype


def test_what_is_unfrozen_later_keeps_its_dtype() -> None:
    ours, plain = Mixed({**PLACEMENTS["streamed"]}, precision="keep"), Mixed(None)
    for run in (ours, plain):
        run.step(0)
        late = [p for each in run.model for p in each.base.requires_grad_(True).parameters()]
        run.optimizer.add_param_group({"params": late})
    assert [ours.step(i) for i in range(1, 4)] == [plain.step(i) for i in range(1, 4)]
    check_same(ours, plain)
