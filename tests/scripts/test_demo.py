"""The demo that compares plain PyTorch with ours: both train alike, and its page shows what they told."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the folder, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small encoder with a tokenizer, as the package with the weights has them."""
    words = ["[UNK]", "[MASK]", *"the of a to is in and object class function value for as be or by on it".split()]
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


@pytest.fixture
def weights(script: Any, folder: Path) -> Path:
    target = folder / "start.safetensors"
    script("demo_model").write_weights(folder, target)
    return target


def test_both_sides_train_alike_where_all_fits(script: Any, folder: Path, weights: Path, tmp_path: Path) -> None:
    demo, pages = script("demo_train"), script("demo_model").Pages(folder)

    def losses(layers: int | None, offload: Path | None) -> list[float]:
        told: list[dict[str, Any]] = []
        asked = demo.Asked(
            folder=folder, weights=weights, layers=layers, offload=offload, rate=1e-2, steps=STEPS, shown_at=(0,)
        )
        demo.train(asked, pages, told.append)
        assert [each["steps"] for each in told[1:]] == [0, STEPS]
        assert told[0]["trained"] < told[0]["parameters"] or layers is None
        return [each["loss"] for each in told[1:]]

    plain, ours, part = losses(None, None), losses(None, tmp_path / "disk"), losses(1, None)
    assert ours == plain and plain[0] == part[0] and plain[1] != part[1]


@pytest.mark.own_process()  # it forks
@pytest.mark.usefixtures("one_thread")
def test_what_a_child_tells_is_heard_and_a_cap_ends_it(script: Any, folder: Path, weights: Path) -> None:
    compare, pages = script("demo_compare"), script("demo_model").Pages(folder)
    common = {"folder": folder, "weights": weights, "layers": None, "offload": None, "rate": 1e-2, "steps": STEPS}
    libraries = script("demo_train").data_bytes()
    # What malloc keeps of what tests have freed would do for so small a model: the cap is below what is taken already.
    asked = [script("demo_train").Asked(**common, cap=cap) for cap in (None, -libraries // 2)]
    trainings = [compare.Training("one", each, pages, libraries) for each in asked]
    compare.until_over(trainings, show=False)
    assert trainings[0].error is None and list(trainings[0].losses()) == [STEPS]
    assert "allocate memory" in trainings[1].error or "MemoryError" in trainings[1].error


@pytest.mark.parametrize("fit", [-1, 0, 1, 3, 6])
def test_the_most_of_the_last_layers_that_train(script: Any, fit: int) -> None:
    tried: list[int] = []
    found = script("demo_compare").most_layers(lambda layers: tried.append(layers) or layers <= fit)
    assert found == (None if fit < 0 else fit) and len(tried) <= 3


def test_the_page_has_both_curves_and_what_was_compared(script: Any) -> None:
    plot = script("demo_plot")
    curves = {"plain <b>": [(0.0, 9.0), (10.0, 6.0)], "ours": [(0.0, 9.0), (5.0, 6.5), (10.0, 5.0)]}
    rows = [{"training": "plain <b>", "loss after": "6.0"}]
    text = plot.page("More", "than fits", curves, rows, "other.html")
    assert text.count("<polyline") == 2 and "plain &lt;b&gt;" in text and "<b>" not in text
    assert 'src="other.html"' in text
