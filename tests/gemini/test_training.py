"""A training loop's habits: they work as in plain PyTorch, whatever the placement."""

import copy
from typing import Any

import pytest
import torch
from loop import WIDTH, Trained, batch, build, check_same
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam


def test_gradients_accumulate_over_several_backwards(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(3):
            for micro in range(3):
                run.backward(run.loss(10 * step + micro) / 3)
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_without_zero_grad_gradients_go_on_adding_up(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(4):
            run.backward(run.loss(step))
            run.optimizer.step()
    check_same(ours, plain)


def test_clipping_by_the_plugin_is_that_of_torch(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement, max_norm=0.05), Trained(None)
    torch.manual_seed(7)
    for step in range(4):
        ours.step(step)
    torch.manual_seed(7)
    for step in range(4):
        plain.backward(plain.loss(step))
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.05)
        assert norm > 0.05
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert ours.model.memory_stats()["step/grad_norm"] == norm.item()
    check_same(ours, plain)


def test_clipping_by_hand_is_that_of_torch(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(4):
            run.backward(run.loss(step))
            if step % 2:
                run.optimizer.clip_grad_by_norm(0.05)
            else:
                run.optimizer.clip_grad_by_value(1e-3)
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_evaluation_between_steps_and_inside_a_step_changes_nothing(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    outputs: list[list[Tensor]] = []
    for run in (ours, plain):
        torch.manual_seed(7)
        seen: list[Tensor] = []
        for step in range(4):
            loss = run.loss(step)
            run.model.eval()
            with torch.no_grad():
                seen.append(run.model(batch(100 + step)))
            run.model.train()
            run.backward(loss)
            with torch.inference_mode():
                run.model.eval()
                seen.append(run.model(batch(200 + step)).clone())
                run.model.train()
            run.optimizer.step()
            with torch.no_grad():
                run.model.eval()
                seen.append(run.model(batch(300 + step)))
                run.model.train()
            run.optimizer.zero_grad()
        outputs.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    check_same(ours, plain)


def test_evaluation_before_any_training_works(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    with torch.no_grad():
        torch.manual_seed(7)
        ours_output = ours.model(batch(1))
        torch.manual_seed(7)
        assert torch.equal(ours_output, plain.model(batch(1)))
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    check_same(ours, plain)


def test_two_forwards_before_their_backwards_work(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(3):
            first, second = run.loss(step), run.loss(50 + step)
            run.backward(second)
            run.backward(first)
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_another_batch_shape_works(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for rows in (4, 1, 9, 4):
            run.backward(run.model(batch(rows, rows)).square().mean())
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_calling_a_part_of_the_model_works(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    for name in ("0", "15"):
        x = batch(3)
        assert torch.equal(ours.model.get_submodule(name)(x), plain.model.get_submodule(name)(x))
    check_at_rest(ours.model)


def test_parameter_groups_schedulers_and_changed_learning_rates_work(placement: dict[str, Any]) -> None:
    results = []
    for managed in (True, False):
        model: Any = build()
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer: Any = HybridAdam([{"params": decay, "weight_decay": 0.2}, {"params": rest, "lr": 3e-3}], lr=1e-2)
        scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **placement))
        if managed:
            model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
        torch.manual_seed(7)
        for step in range(4):
            loss = model(batch(step)).square().mean()
            booster.backward(loss, optimizer) if managed else loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append(masters(model) if managed else dict(model.named_parameters()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_torch_optimizer_and_its_scheduler_are_taken_over(kind: Any, placement: dict[str, Any]) -> None:
    results = []
    for managed in (True, False):
        model: Any = build()
        optimizer: Any = kind(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        model(batch(99)).square().mean().backward()
        optimizer.step()  # it has a history, which goes on
        optimizer.zero_grad()
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **placement))
        if managed:
            model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
            assert isinstance(optimizer, HybridAdam)
        torch.manual_seed(7)
        for step in range(4):
            loss = model(batch(step)).square().mean()
            booster.backward(loss, optimizer) if managed else loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append((masters(model) if managed else dict(model.named_parameters()), scheduler.get_last_lr()))
    (ours, our_rate), (theirs, their_rate) = results
    assert our_rate == their_rate
    # The one parameter whose length is no multiple of 16 may differ in the last place of exp_avg_sq.
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if theirs[name].numel() % 16 == 0)


def test_the_optimizer_state_goes_to_torch_and_back(placement: dict[str, Any]) -> None:
    ours = Trained(placement)
    for step in range(2):
        ours.step(step)
    saved = ours.optimizer.state_dict()
    twin = build()
    twin.load_state_dict(ours.model.state_dict())
    torch_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    torch_optimizer.load_state_dict(copy.deepcopy(saved))
    back = Trained(placement)
    back.model.load_state_dict(twin.state_dict())
    back.optimizer.load_state_dict(torch_optimizer.state_dict())
    for run in (ours, back):
        torch.manual_seed(3)
        run.step(5)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights().values(), back.weights().values(), strict=True))


def test_two_boosted_models_do_not_know_of_each_other(placement: dict[str, Any], tmp_path: Any) -> None:
    ours, plain = Trained(placement), Trained(None)
    teacher = Trained(placement)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(3):
            run.step(step)
            if run is ours:
                with torch.no_grad():
                    state = torch.random.get_rng_state()
                    teacher.model(batch(step))
                    torch.random.set_rng_state(state)
    check_same(ours, plain)
    check_at_rest(teacher.model)


def test_fp16_trains_with_a_loss_scale_and_skips_steps_that_overflow(placement: dict[str, Any]) -> None:
    run = Trained(placement, "fp16", initial_scale=2.0**40, max_scale=2.0**40, hysteresis=1)
    before = run.weights()
    run.step(0)
    assert run.model.memory_stats()["step/skipped_count"] == 1
    assert run.model.memory_stats()["step/loss_scale"] == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    first = run.step(1)
    for step in range(2, 60):
        last = run.step(step)
    assert run.model.memory_stats()["step/skipped_count"] > 1
    assert last < first / 2


def test_bf16_casts_inputs_and_keeps_buffers(placement: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    booster = Booster(plugin=GeminiPlugin(telemetry=False, force_outputs_fp32=True, **placement))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    output = model(batch(0))
    assert output.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    booster.backward(output.mean(), optimizer)
