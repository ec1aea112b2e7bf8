"""Where a model meets two dtypes because of ``precision``: what is said, and about which parameters."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin


def boosted(model: nn.Module, precision: str = "bf16", **plugin: Any) -> Any:
    return Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **plugin)).boost(model)[0]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.cell(x, torch.zeros(x.shape[0], 8))


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.zeros(4, x.shape[1]).index_add(0, torch.tensor([0, 1]), x)


class Scatters(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.zeros(2, 8).scatter(0, torch.zeros(2, 8, dtype=torch.long), x)


class Puts(nn.Module):
    def forward(self, x: Tensor) -> Any:
        made = torch.zeros(4, 8)
        made[torch.tensor([1, 2])] = x
        return made


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.mix(torch.linspace(0, 1, 8).sin())


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, 3)

    def forward(self, x: Tensor) -> Any:
        return self.convolution(torch.ones(1, 1, 8)), x


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.scaled_dot_product_attention(x[None], torch.ones(1, 2, 8), x[None])


class Inverts(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.linalg.inv(x.T @ x)


class ToNumpy(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.from_numpy(x.numpy())


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).detach()
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Cell, "blocks.1.cell (GRUCell)"), (Embeds, "blocks.1.mix (Linear)"),
        (Convolves, "blocks.1.convolution (Conv1d)"), (Sums, "blocks.1 (Sums)"), (Scatters, "blocks.1 (Scatters)"),
        (Puts, "blocks.1 (Puts)"), (Attends, "blocks.1 (Attends)"), (Inverts, "blocks.1 (Inverts)"),
        (ToNumpy, "blocks.1 (ToNumpy)"),
    ],
)  # fmt: skip
def test_two_dtypes_in_a_forward_name_the_module_and_both_cures(kind: type[nn.Module], where: str) -> None:
    model = boosted(Net(kind()))
    with pytest.raises((RuntimeError, TypeError)) as caught:
        model(torch.ones(2, 8))
    for part in (where, "bfloat16", "dtype=x.dtype", "precision='fp32'", "torch.autocast('cpu'"):
        assert part in str(caught.value)
    plain = Net(kind()).to(torch.bfloat16)
    with pytest.raises(type(caught.value)) as raw:
        plain(torch.ones(2, 8, dtype=torch.bfloat16))
    assert str(caught.value).startswith(str(raw.value))


def test_the_forward_that_called_one_of_torchs_modules_is_named_with_its_line() -> None:
    with pytest.raises(
        RuntimeError, match=r"made in the forward of blocks.1 \(Embeds\), which calls it in test_dtype_.*:\d"
    ):
        boosted(Net(Embeds()))(torch.ones(2, 8))


def test_the_second_cure_works() -> None:
    model = boosted(Net(Cell()), precision="fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(torch.ones(2, 8))).all()


def test_other_errors_and_other_precisions_are_left_alone() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Any:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        boosted(Net(Fails()))(torch.ones(2, 8))
    with pytest.raises(RuntimeError) as caught:
        boosted(Net(nn.Identity()), precision="fp32")(torch.ones(2, 8, dtype=torch.float64))
    assert "precision" not in str(caught.value)


class Mixed(nn.Module):
    def __init__(self, one: torch.dtype, other: torch.dtype) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4).to(one), nn.Linear(4, 4).to(other)


@pytest.mark.parametrize(
    ("one", "other", "precision", "says"),
    [
        (torch.float32, torch.bfloat16, "fp32", r"2 from bfloat16 to float32 \(other.weight, other.bias\)"),
        (torch.float32, torch.bfloat16, "bf16", r"2 from float32 to bfloat16 \(one.weight, one.bias\)"),
        (torch.bfloat16, torch.bfloat16, "fp32", r"4 from bfloat16 to float32 \(one.weight, .*other.bias\)"),
        (torch.float16, torch.float16, "bf16", r"4 from float16 to bfloat16"),
        (torch.bfloat16, torch.float16, "bf16", r"2 from float16 to bfloat16 \(other"),
    ],
)
def test_parameters_whose_dtype_is_overruled_are_named_in_a_warning(
    one: torch.dtype, other: torch.dtype, precision: str, says: str
) -> None:
    with pytest.warns(UserWarning, match=rf"precision='{precision}' overrules .*{says}.*precision='keep'") as caught:
        boosted(Mixed(one, other), precision)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("one", "other", "precision"),
    [
        (torch.float32, torch.float32, "fp32"), (torch.float32, torch.float32, "bf16"),
        (torch.float32, torch.float32, "fp16"), (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float64, "fp32"), (torch.float32, torch.float64, "bf16"),
    ],
)  # fmt: skip
def test_models_with_one_dtype_and_the_precision_for_it_are_not_warned_of(
    one: torch.dtype, other: torch.dtype, precision: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boosted(Mixed(one, other), precision)
