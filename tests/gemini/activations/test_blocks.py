"""The blocks of a model are the outermost modules that repeat."""

from collections import OrderedDict

from torch import nn
from torch.nn import TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

from gemini.activations.blocks import blocks_of
from gemini.train.model import GPT2LMHeadModel, GPTConfig


def layer(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList(layer() for _ in range(4)), nn.Linear(8, 4)


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks, self.pool = nn.ModuleList(layer() for _ in range(depth)), nn.AvgPool1d(2)


def names(model: nn.Module) -> list[str]:
    known = {module: name for name, module in model.named_modules()}
    return [known[block] for block in blocks_of(model)]


def test_the_layers_of_a_transformer_are_its_blocks() -> None:
    model = GPT2LMHeadModel(GPTConfig(layers=3, hidden=8, heads=2, seq_len=4))
    assert names(model) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def test_encoder_and_decoder_have_blocks_of_their_own() -> None:
    encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"e": encoder, "d": TransformerDecoder(TransformerDecoderLayer(8, 2, 8), 3)})
    assert names(model) == ["e.layers.0", "e.layers.1", "d.layers.0", "d.layers.1", "d.layers.2"]


def test_what_repeats_within_many_blocks_belongs_to_them() -> None:
    assert names(nn.Sequential(*(Experts() for _ in range(6)))) == ["0", "1", "2", "3", "4", "5"]


def test_a_few_modules_with_blocks_in_them_are_stages() -> None:
    assert names(nn.Sequential(Stage(2), Stage(3))) == [
        "0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1", "1.blocks.2"
    ]  # fmt: skip


def test_layers_without_parts_are_no_blocks() -> None:
    assert names(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())) == []
    assert names(nn.Linear(2, 2)) == []


def test_a_block_that_is_listed_twice_is_one() -> None:
    shared = layer()
    assert names(nn.Sequential(OrderedDict(a=shared, b=shared, c=layer()))) == ["a", "c"]
