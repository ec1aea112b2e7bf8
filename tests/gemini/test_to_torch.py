"""A boosted model that is made a plain one again."""

import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, batch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import gemini
from gemini.boosted import boosted, is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.stat.cli import main


def trained(placement: str, precision: str, **plugin: Any) -> Trained:
    ours = Trained(PLACEMENTS[placement], precision, **plugin)
    for step in range(2):
        ours.step(step)
    return ours


def status(name: str) -> int:
    """A number of bytes from the system's view of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("precision", "options"), [("fp32", {}), ("bf16", {}), ("bf16", {"split_master": True})])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_is_the_module_that_it_was_with_the_values_that_it_has(
    placement: str, precision: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = trained(placement, precision, **options)
    parameters, expected = dict(ours.model.named_parameters()), values(ours.model)
    plain = gemini.to_torch(ours.model)
    assert plain is ours.model and type(plain) is nn.Sequential and not is_boosted(plain)
    assert all(parameter is parameters[name] for name, parameter in plain.named_parameters())
    assert {type(parameter) for parameter in plain.parameters()} == {nn.Parameter}
    assert expected.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())
    for module in plain.modules():
        assert not vars(module).keys() & {"_gemini", "_apply"}
        assert not (module._forward_hooks or module._forward_pre_hooks or module._state_dict_hooks)
        assert not (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
    for parameter in plain.parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    with pytest.raises(ValueError, match=r"has been made a plain one by gemini\.to_torch since"):
        ours.optimizer.step()
    pickle.loads(pickle.dumps(plain))
    plain.half().float()


def test_it_trains_on_as_a_plain_model_of_these_values_does() -> None:
    ours = trained("streamed", "fp32")
    state = ours.model.state_dict()
    plain = Trained(None)
    plain.model.load_state_dict(state)
    gemini.to_torch(ours.model)
    losses = []
    for model in (ours.model, plain.model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(3)
        for step in range(3):
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_it_can_be_boosted_again_with_the_states_of_before() -> None:
    ours, other = trained("streamed", "fp32"), trained("streamed", "fp32")
    state = ours.optimizer.state_dict()
    gemini.to_torch(ours.model)
    optimizer = HybridAdam(ours.model.parameters(), lr=1e-2, weight_decay=0.1)
    ours.model, ours.optimizer, *_ = ours.booster.boost(ours.model, optimizer)
    ours.optimizer.load_state_dict(state)
    losses = []
    for each in (ours, other):
        torch.manual_seed(3)
        losses.append([each.step(step) for step in range(2, 5)])
    assert losses[0] == losses[1]


def test_ties_buffers_and_frozen_parameters_stay() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.requires_grad_(False)
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam([p for p in model.parameters() if p.requires_grad]))
    tokens = torch.arange(8)[None]
    booster.backward(model(tokens, labels=tokens).loss, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    expected = values(model)
    plain = gemini.to_torch(model)
    assert type(plain) is GPT2LMHeadModel
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert {name: value.dtype for name, value in plain.state_dict().items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())
    plain.float()(tokens, labels=tokens).loss.backward()
    assert plain.transformer.wpe.weight.grad is None


def test_another_dtype_is_that_of_all_parameters() -> None:
    ours = trained("resident", "bf16")
    expected = values(ours.model)
    plain = gemini.to_torch(ours.model, dtype=torch.bfloat16)
    for name, parameter in plain.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, expected[name].bfloat16())


def test_a_released_model_becomes_a_plain_one(tmp_path: Path) -> None:
    ours = trained("resident", "fp32")
    expected = values(ours.model)
    ours.booster.release(ours.model, tmp_path)
    plain = gemini.to_torch(ours.model)
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


def test_what_would_be_lost_is_refused_and_the_model_goes_on() -> None:
    ours, other = trained("resident", "fp32"), trained("resident", "fp32")
    with pytest.raises(ValueError, match="expected a dtype of"):
        gemini.to_torch(ours.model, dtype=torch.int8)
    held = ours.model[0].weight.data
    with pytest.raises(ValueError, match=r"memory of 0\.weight is held outside"):
        gemini.to_torch(ours.model)
    del held
    torch.manual_seed(3)
    ours.backward(ours.loss(2))
    with pytest.raises(ValueError, match="which would be lost"):
        gemini.to_torch(ours.model)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    torch.manual_seed(3)
    other.step(2)
    losses = []
    for each in (ours, other):
        torch.manual_seed(4)
        losses.append(each.step(3))
    assert losses[0] == losses[1]
    with pytest.raises(TypeError, match=r"expected a model that booster\.boost returned"):
        gemini.to_torch(nn.Linear(2, 2))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak RSS")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_values_go_over_chunk_by_chunk(precision: str) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(24)])
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    booster.backward(model(torch.ones(1, 1024)).square().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    boosted(model).manager.settle()
    held = status("VmRSS")
    assert sum(chunk.layout.numel for chunk in boosted(model).manager.chunks) >= 24 << 20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    gemini.to_torch(model)
    assert status("VmHWM") - held < 32 << 20  # the plain model is 96 MiB
    gc.collect()
    assert status("VmRSS") < held - (24 << 20) * 8 + (16 << 20)  # two states of 4 bytes, at the least


def test_its_run_has_ended_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    booster = Booster(plugin=GeminiPlugin(telemetry=tmp_path))
    model, *_ = booster.boost(nn.Linear(4, 4))
    telemetry = boosted(model).telemetry
    assert telemetry is not None
    gemini.to_torch(model)
    main([str(telemetry.run_dir), "--json"])
    assert json.loads(capsys.readouterr().out)["status"] == "finished"


def test_nothing_of_the_chunks_stays() -> None:
    ours = trained("streamed", "bf16")
    manager = weakref.ref(boosted(ours.model).manager)
    chunks = [weakref.ref(chunk) for chunk in boosted(ours.model).manager.chunks]
    gemini.to_torch(ours.model)
    gc.collect()
    assert manager() is None
    assert not [chunk for chunk in chunks if chunk() is not None]
