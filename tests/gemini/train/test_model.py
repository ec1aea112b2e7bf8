"""The GPT of the main job is transformers' GPT-2, name for name and number for number."""

import json
from pathlib import Path

import pytest
import torch

from gemini.train.model import GPT2LMHeadModel, GPTConfig

transformers = pytest.importorskip("transformers")

CONFIG = GPTConfig(layers=2, hidden=48, heads=3, seq_len=24, vocab_size=64)


@pytest.fixture
def theirs(tmp_path: Path) -> torch.nn.Module:
    CONFIG.save_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config).eval()


def test_names_and_shapes_are_those_of_transformers(theirs: torch.nn.Module) -> None:
    ours = {name: value.shape for name, value in GPT2LMHeadModel(CONFIG).state_dict().items()}
    assert ours == {name: value.shape for name, value in theirs.state_dict().items()}


def test_logits_and_loss_are_those_of_transformers(theirs: torch.nn.Module) -> None:
    ours = GPT2LMHeadModel(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        # The attention of transformers adds in another order.
        torch.testing.assert_close(ours(tokens), expected.logits, rtol=1e-5, atol=1e-5)
        loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_the_parameter_count_is_the_models() -> None:
    assert CONFIG.parameter_count() == sum(p.numel() for p in GPT2LMHeadModel(CONFIG).parameters())


def test_the_head_is_the_embedding() -> None:
    model = GPT2LMHeadModel(CONFIG)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_start_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPTConfig(layers=8, hidden=64, heads=4, seq_len=16))
    block = model.transformer.h[0]
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.mlp.c_fc.bias.any()


def test_the_configuration_is_json_with_the_dtype_of_the_weights(tmp_path: Path) -> None:
    config = GPTConfig(layers=1, hidden=8, heads=1, seq_len=4, dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changed", "message"), [({"heads": 5}, "multiple of heads"), ({"layers": 0}, "layers must be")]
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"layers": 2, "hidden": 48, "heads": 3, "seq_len": 24, **changed})
