"""The demo that compares plain PyTorch with ours: both train alike, and its page shows what they told."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the folder, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small encoder with a tokenizer, as the package with the weights has them."""
    words = ["[UNK]", "[MASK]", *"the of a to is in and object class function value".split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def trained(script: Any, folder: Path, build: Any) -> list[float]:
    worker, told = script("demo_worker"), []
    torch.manual_seed(1)  # of the head, which the weights don't have
    model, optimizer, step = build(worker)
    asked = {"seconds": 0, "steps": 3, "rate": 1e-2}
    pages = worker.Pages(folder)
    worker.train(pages, model, optimizer, step, asked, told.append)
    assert told[-1]["ended"] and told[-1]["steps"] == 3
    return [worker.held_out_loss(pages, model)]


def test_both_sides_train_alike_where_all_fits(script: Any, folder: Path, tmp_path: Path) -> None:
    plain = trained(script, folder, lambda worker: worker.plain(folder, -1, 1e-2))
    ours = trained(script, folder, lambda worker: worker.ours(folder, str(tmp_path / "disk"), 1e-2, None))
    part = trained(script, folder, lambda worker: worker.plain(folder, 1, 1e-2))
    assert ours == plain != part


@pytest.mark.parametrize("fit", [-1, 0, 1, 3, 6])
def test_the_most_of_the_last_layers_that_train(script: Any, fit: int) -> None:
    tried: list[int] = []
    found = script("demo_compare").most_layers(lambda layers: tried.append(layers) or layers <= fit)
    assert found == (None if fit < 0 else fit) and len(tried) <= 3


def test_the_page_has_both_curves_and_what_was_compared(script: Any) -> None:
    plot = script("demo_plot")
    curves = {"plain <b>": [(0.0, 9.0), (10.0, 6.0)], "ours": [(0.0, 9.0), (5.0, 6.5), (10.0, 5.0)]}
    rows = [{"training": "plain <b>", "loss after": "6.0"}]
    text = plot.page("More", "than fits", {"seconds": curves, "steps": curves}, rows, "other.html")
    assert text.count("<polyline") == 4 and "plain &lt;b&gt;" in text and "<b>" not in text
    assert 'src="other.html"' in text
