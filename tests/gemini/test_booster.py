"""The contract of `Booster`: the two snippets that users start from, and what goes in and out of `boost`."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.boosting import boost
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam


def token_batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 96, (2, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "labels": t} for t in tokens]


def test_the_first_snippet_of_the_contract_runs() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )
    dataloader = token_batches(1) * 6

    gemini.launch_from_torch({})
    plugin = GeminiPlugin()
    booster = Booster(plugin=plugin)
    with LazyInitContext():
        model = transformers.GPT2LMHeadModel(config)
    optimizer = HybridAdam(model.parameters(), lr=1e-3)
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for batch in dataloader:
        loss = model(**batch).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert model.config is config
    assert f"{loss:.3f}"
    model.eval()
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 7)
    stats = model.memory_stats()
    assert all(isinstance(value, int | float) for value in stats.values())
    for tier in ("device", "host", "disk"):
        assert 0 <= stats[f"{tier}/used_bytes"] <= stats[f"{tier}/peak_bytes"] <= stats[f"{tier}/capacity_bytes"]
    assert {"chunk/count", "chunk/numel", "chunk/waste_ratio", "move/fetch_count", "move/prefetch_hit_ratio"} <= set(
        stats
    )
    assert stats["non_model/peak_bytes"] >= 0
    assert "host" in model.memory_summary()


def test_generating_equals_the_unmanaged_model_when_everything_streams() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=None,
    )
    outputs = []
    for managed in (True, False):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        if managed:
            plugin = GeminiPlugin(precision="fp32", telemetry=False, device_memory="40KiB")
            model, *_ = Booster(plugin=plugin).boost(model)
        outputs.append(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False, pad_token_id=0))
        if managed:
            assert model.memory_stats()["move/evict_count"] > 0
    assert torch.equal(*outputs)


def test_the_second_snippet_of_the_contract_runs() -> None:
    model: Any = nn.Linear(4, 4)
    optimizer: Any = HybridAdam(model.parameters())
    lr_scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    dataloader: Any = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)
    booster = Booster(plugin=GeminiPlugin())
    given = (model, optimizer, lr_scheduler, dataloader)

    model, optimizer, lr_scheduler, dataloader = booster.boost(model, optimizer, lr_scheduler, dataloader)

    assert (model, optimizer, lr_scheduler, dataloader) == given
    for (batch,) in dataloader:
        booster.backward(model(batch).sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()


def make() -> dict[str, Any]:
    model = nn.Linear(4, 4)
    optimizer = HybridAdam(model.parameters())
    return {
        "model": model,
        "optimizer": optimizer,
        "criterion": nn.MSELoss(),
        "dataloader": [1, 2, 3],
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
    }


def test_boost_returns_five_objects_in_the_documented_order() -> None:
    objects = make()
    assert Booster(plugin=GeminiPlugin(telemetry=False)).boost(*objects.values()) == tuple(objects.values())
    objects = make()
    result = Booster(plugin=GeminiPlugin(telemetry=False)).boost(
        objects["model"], objects["optimizer"], dataloader=objects["dataloader"]
    )
    assert result == (objects["model"], objects["optimizer"], None, objects["dataloader"], None)
    objects = make()
    assert Booster(plugin=GeminiPlugin(telemetry=False)).boost(objects["model"])[1:] == (None,) * 4


@pytest.mark.parametrize(
    "order",
    [
        ("model", "optimizer", "lr_scheduler", "dataloader"),
        ("optimizer", "model"),
        ("model", "optimizer", "dataloader", "criterion", "lr_scheduler"),
        ("model", "optimizer", "dataloader"),
        ("dataloader", "lr_scheduler", "optimizer", "model", "criterion"),
    ],
)
def test_boost_returns_exactly_what_it_was_given_in_another_order(order: tuple[str, ...]) -> None:
    objects = make()
    given = tuple(objects[name] for name in order)
    assert Booster(plugin=GeminiPlugin(telemetry=False)).boost(*given) == given


def test_a_plain_function_is_a_criterion() -> None:
    objects = make()
    result = Booster(plugin=GeminiPlugin(telemetry=False)).boost(
        objects["model"], objects["optimizer"], torch.nn.functional.mse_loss
    )
    assert result[2] is torch.nn.functional.mse_loss


@pytest.mark.parametrize("wrong", [42, "a model", b"", torch.ones(2), [], ()])
def test_an_object_of_no_known_kind_is_named(wrong: Any) -> None:
    objects = make()
    with pytest.raises(TypeError, match=type(wrong).__name__):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(objects["model"], objects["optimizer"], wrong)
    assert not objects["model"].weight.isnan().any()


def test_other_mistakes_of_boost_are_named() -> None:
    objects = make()
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    with pytest.raises(TypeError, match="needs a model"):
        booster.boost(objects["optimizer"])
    with pytest.raises(TypeError, match="two objects of the kind optimizer"):
        booster.boost(objects["model"], objects["optimizer"], objects["optimizer"])
    with pytest.raises(TypeError, match="LBFGS"):
        booster.boost(objects["model"], torch.optim.LBFGS(objects["model"].parameters(), lr=0.1))
    with pytest.raises(TypeError, match="boost returned"):
        booster.backward(objects["model"](torch.ones(1, 4)).sum(), objects["optimizer"])
    booster.boost(objects["model"], objects["optimizer"])
    with pytest.raises(ValueError, match="boosted already"):
        booster.boost(objects["model"], objects["optimizer"])
    with pytest.raises(TypeError, match="GeminiPlugin"):
        Booster(plugin="gemini")  # type: ignore[arg-type]


def test_boost_draws_no_random_number_and_keeps_names_and_ties() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    names = [name for name, _ in model.named_parameters()]
    before = torch.random.get_rng_state()
    boosted, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(model.parameters()))
    assert torch.equal(before, torch.random.get_rng_state())
    assert boosted is model
    assert [name for name, _ in boosted.named_parameters()] == names
    assert boosted["b"].weight is boosted["a"].weight
    assert type(boosted).__name__ == "ModuleDict"


def test_no_sync_and_prepare_dataloader_work() -> None:
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    objects = make()
    with booster.no_sync(objects["model"], objects["optimizer"]):
        pass
    dataset = TensorDataset(torch.arange(8.0))
    first, again, other = (
        [b[0].tolist() for b in booster.plugin.prepare_dataloader(dataset, 2, shuffle=True, seed=s)] for s in (1, 1, 2)
    )
    assert first == again != other


def test_the_kernel_has_its_memory_before_what_is_left_is_given_to_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there is no memory for it the compiler ends the process, without any exception.
    order: list[str] = []

    def noting(name: str) -> None:
        original = getattr(boost, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(boost, name, note)

    noting("warm_up")
    noting("find_capacities")
    model = nn.Linear(4, 4)
    Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(model.parameters()))
    assert order[:2] == ["warm_up", "find_capacities"]
