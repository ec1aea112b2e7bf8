"""``evaluate()`` and ``predict()`` of a model that has not been trained: in chunks, in what memory there is."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from trainer_rig import (  # noqa: E402
    Maker,
    ManagedTrainer,
    Tokens,
    arguments,
    differing,
    logged,
    model,
)

from gemini.boosted import boosted  # noqa: E402
from gemini.booster.plugin import GeminiPlugin  # noqa: E402
from gemini.chunk import MASTER, Tier  # noqa: E402
from gemini.lazy import LazyInitContext  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings

LAYERS = 16


def tight(folder: Path) -> GeminiPlugin:
    """Half of the RAM that the parameters of `LAYERS` layers take."""
    return GeminiPlugin(
        precision="fp32", telemetry=False, host_memory="400KiB", disk_memory="100MiB", offload_dir=folder,
        chunk_config_dict={1: {"chunk_size": 4096}},
    )  # fmt: skip


@pytest.mark.parametrize("is_lazy", [False, True])
def test_a_model_larger_than_ram_is_evaluated_and_predicts(is_lazy: bool, tmp_path: Path) -> None:
    if is_lazy:
        with LazyInitContext():
            ours = model(LAYERS)
    else:
        ours = model(LAYERS)
    plain = Maker(None, tmp_path).trainer(model(LAYERS), train_dataset=None, eval_dataset=Tokens(10))
    trainer = ManagedTrainer(
        model=ours, args=arguments(tmp_path), eval_dataset=Tokens(10), gemini_plugin=tight(tmp_path)
    )
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    found, expected = trainer.predict(Tokens(8)).predictions, plain.predict(Tokens(8)).predictions
    assert torch.equal(torch.tensor(found), torch.tensor(expected))
    assert sum(p.numel() * 4 for p in ours.parameters()) > 2 * boosted(ours).capacities.nbytes[Tier.HOST]
    chunks = boosted(ours).manager.chunks
    assert any(part.tier is Tier.DISK for chunk in chunks for part in chunk.homes[MASTER].parts)
    assert all(chunk.gradient is None for chunk in chunks)  # no room for training
    assert not differing(ours, plain.model)


def test_training_after_it_is_by_the_arguments_of_then(tmp_path: Path) -> None:
    results = []
    for place in (None, "streamed", "disk"):
        maker = Maker(place, tmp_path)
        args = arguments(tmp_path, max_grad_norm=0.5)
        trainer = maker.trainer(model(), args, eval_dataset=Tokens(8))
        trainer.evaluate()
        assert trainer.optimizer is None
        args.learning_rate, args.weight_decay = 3e-3, 0.1
        trainer.model.transformer.wpe.requires_grad_(False)
        trainer.train()
        trainer.evaluate()
        results.append((logged(trainer), trainer.model))
    for ours in results[1:]:
        assert ours[0] == results[0][0]
        assert not differing(ours[1], results[0][1])


def test_updates_in_backward_and_a_given_optimizer_may_be_evaluated_first(tmp_path: Path) -> None:
    results = []
    for place, given in ((None, {}), ("disk", {"update_in_backward": True}), ("default", {})):
        trained = model()
        optimizer: Any = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        optimizers = (None if given else optimizer, None)
        trainer = Maker(place, tmp_path, **given).trainer(trained, eval_dataset=Tokens(8), optimizers=optimizers)
        seen = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        results.append((seen, [entry["loss"] for entry in logged(trainer) if "loss" in entry], trained))
    for ours in results[1:]:
        assert ours[:2] == results[0][:2]
        assert not differing(ours[2], results[0][2])
