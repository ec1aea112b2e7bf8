"""A training loop's habits, and its accidents: they work as in plain PyTorch, whatever the placement."""

import copy
import pickle
from typing import Any

import pytest
import torch
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

WIDTH = 64
SMALL = {"chunk_config_dict": {1: {"chunk_size": 1024}}}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "36KiB", **SMALL},
    "disk": {"host_memory": "300KiB", "offload_dir": "disk", **SMALL},
}


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8))


def batch(step: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    chosen = dict(request.param)
    if "offload_dir" in chosen:
        chosen["offload_dir"] = tmp_path
    return chosen


class Trained:
    """The same loop with and without management."""

    def __init__(self, placement: dict[str, Any] | None, precision: str = "fp32", **plugin: Any) -> None:
        model: Any = build()
        self.is_managed = placement is not None
        self.optimizer: Any = HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
        self.model: Any = model
        if placement is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **placement, **plugin))
            self.model, self.optimizer, *_ = self.booster.boost(model, self.optimizer)
        torch.manual_seed(7)

    def loss(self, step: int) -> Tensor:
        return self.model(batch(step)).square().mean()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        if self.is_managed:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()

    def step(self, number: int) -> float:
        loss = self.loss(number)
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        if self.is_managed:
            return masters(self.model)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def check_same(ours: Trained, plain: Trained) -> None:
    check_at_rest(ours.model)
    theirs = plain.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]


# -- habits


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


# -- precision


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


# -- accidents


class Accident(Exception):
    pass


def fail(*_: Any) -> None:
    raise Accident


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("plain_backward", [False, True], ids=["booster", "loss.backward"])
def test_after_an_exception_the_next_step_is_as_if_nothing_had_been(
    where: str, plain_backward: bool, placement: dict[str, Any]
) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.step(1)
    layer = ours.model[6]
    if where == "forward":
        handle = layer.register_forward_hook(fail)
        with pytest.raises(Accident):
            ours.loss(2)
        handle.remove()
    else:
        loss = ours.loss(2)
        handle = layer.weight.register_hook(fail)
        with pytest.raises(Accident):
            loss.backward() if plain_backward else ours.backward(loss)
        handle.remove()
    for run in (ours, plain):
        torch.manual_seed(9)
        run.step(3)
        run.step(4)
    check_same(ours, plain)


def test_out_of_memory_in_the_model_leaves_everything_usable(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("the activations are too large")

    handle = ours.model[9].register_forward_pre_hook(exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        ours.loss(0)
    handle.remove()
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(1)
    check_same(ours, plain)


def test_a_parameter_away_from_its_chunk_reads_as_nan() -> None:
    run = Trained({"device_memory": "24KiB", **SMALL})
    run.step(0)
    away = [c for c in boosted(run.model).manager.chunks if not c.is_resident]
    assert away
    assert away[0].bindings[0].parameter.isnan().all()


def test_accessors_show_the_values_after_a_step() -> None:
    ours, plain = Trained({}), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    for (_, a), b in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copying_pickling_and_moving_a_boosted_model_are_refused_with_the_way_to_do_it() -> None:
    model = Trained({}).model
    for forbidden, hint in (
        (lambda: copy.deepcopy(model), "state_dict"),
        (lambda: pickle.dumps(model), "save_model"),
        (lambda: model.half(), "precision"),
        (lambda: model.to("cpu"), "chunks decide"),
    ):
        with pytest.raises(RuntimeError, match=hint):
            forbidden()


def test_zero_grad_of_the_model_forgets_the_gradients_in_the_chunks() -> None:
    ours, plain = Trained({}), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.backward(run.loss(0))
        run.model.zero_grad()
        run.step(1)
    check_same(ours, plain)


def test_a_parameter_unfrozen_after_boost_is_named_instead_of_silently_not_trained() -> None:
    model: Any = build()
    model[0].requires_grad_(False)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    model[0].requires_grad_(True)
    booster.backward(model(batch(0)).sum(), optimizer)
    before = masters(model)
    with pytest.raises(ValueError, match=r"0\.weight .*before booster\.boost"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in masters(model).items())


def test_static_fractions_bound_what_is_on_the_device() -> None:
    for optim, param in ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.0)):
        plugin = {"placement_policy": "static", "offload_optim_frac": optim, "offload_param_frac": param}
        run = Trained({"device_memory": "4MiB", **SMALL}, precision="bf16", **plugin)
        for step in range(3):
            run.step(step)
        stats = run.model.memory_stats()
        manager = boosted(run.model).manager
        homes = sum(h.nbytes for c in manager.chunks for h in c.homes.values() if h.tier is Tier.DEVICE)
        homes += sum(c.gradient.buffer.nbytes for c in manager.chunks if c.gradient.buffer.tier is Tier.DEVICE)
        chunk = max(
            stats["model_data/total_bytes"] * c.layout.numel // sum(d.layout.numel for d in manager.chunks)
            for c in manager.chunks
        )
        assert (
            (1 - optim) * stats["model_data/total_bytes"] - chunk
            <= homes
            <= (1 - optim) * stats["model_data/total_bytes"]
        )
        copies = sum(c.full_nbytes for c in manager.chunks)
        assert stats["device/peak_bytes"] - homes <= max(
            (1 - param) * copies, 2 * max(c.full_nbytes for c in manager.chunks)
        )


def test_the_device_grows_by_what_the_warm_up_shows_to_be_free() -> None:
    run = Trained({"device_memory": "36KiB", **SMALL})
    state = boosted(run.model)
    state.runtime._device_limit_bytes = 200 << 10
    run.step(0)
    state.meter.peak_bytes = 50 << 10
    run.step(1)
    assert run.model.memory_stats()["device/capacity_bytes"] == 150 << 10
    for step in range(2, 5):
        run.step(step)
    assert 36 << 10 < run.model.memory_stats()["device/peak_bytes"] <= 150 << 10


def test_add_param_group_after_boost_says_what_to_do() -> None:
    run = Trained({})
    with pytest.raises(ValueError, match=r"before booster\.boost"):
        run.optimizer.add_param_group({"params": [run.model[0].weight]})


def test_a_sparse_embedding_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Embedding(8, 8, sparse=True))
    with pytest.raises(ValueError, match="sparse=False"):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model)
    assert not model[0].weight.isnan().any()


def test_a_model_that_is_dropped_gives_its_memory_and_files_back(tmp_path: Any) -> None:
    import gc
    import threading
    import weakref

    threads = set(threading.enumerate())
    run = Trained({"host_memory": "300KiB", "offload_dir": tmp_path, **SMALL})
    run.step(0)
    assert [t for t in set(threading.enumerate()) - threads if t.name.startswith("gemini-memory-update")]
    chunk = weakref.ref(boosted(run.model).manager.chunks[0])
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None
    assert chunk() is None
    assert not [t.name for t in set(threading.enumerate()) - threads if t.name.startswith("gemini-memory-update")]
    assert list(tmp_path.iterdir()) == []


# -- bad input


def tiny_lazy() -> nn.Module:
    with LazyInitContext():
        return build()


@pytest.mark.parametrize("start", [build, tiny_lazy], ids=["eager", "lazy"])
def test_capacities_that_cannot_work_are_named_before_anything_is_changed(start: Any, tmp_path: Any) -> None:
    model = start()
    optimizer = HybridAdam(model.parameters())
    (tmp_path / "file").write_text("")
    for plugin, error, says in (
        ({"host_memory": "200KiB"}, OutOfMemory, "offload_dir="),
        (
            {"host_memory": "300KiB", "offload_dir": tmp_path, "disk_memory": "9KiB", **SMALL},
            OutOfMemory,
            "disk_memory",
        ),
        ({"host_memory": "300KiB", "offload_dir": tmp_path / "file" / "x", **SMALL}, OSError, "offload_dir"),
        ({"device_memory": 100}, OutOfMemory, "device_memory to"),
        ({"host_memory": 100, "offload_dir": tmp_path}, OutOfMemory, "host_memory"),
    ):
        with pytest.raises(error, match=says):
            Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin)).boost(model, optimizer)
    # None of this has touched it.
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, optimizer)
    expected = dict(build().named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in masters(model).items())


def test_arguments_that_make_no_sense_are_refused_by_name(tmp_path: Any) -> None:
    for arguments, error, says in (
        ({"placement_policy": "const"}, ValueError, "'auto' or 'static'"),
        ({"precision": "fp8"}, ValueError, "bf16"),
        ({"host_memory": "many"}, ValueError, "host_memory"),
        ({"host_memory": 0}, ValueError, "host_memory"),
        ({"disk_memory": "1GiB"}, ValueError, "offload_dir"),
        ({"max_prefetch": -1}, ValueError, "max_prefetch"),
        ({"placement_policy": "static", "offload_optim_frac": 1.5}, ValueError, "offload_optim_frac"),
        ({"chunk_config_dict": {2: {"chunk_size": 1}}}, ValueError, "chunk_config_dict"),
        ({"tp_size": 2}, NotImplementedError, "tp_size"),
        ({"master_weights": False}, NotImplementedError, "master_weights"),
    ):
        with pytest.raises(error, match=says):
            GeminiPlugin(**arguments)
    with pytest.warns(DeprecationWarning, match="static"):
        GeminiPlugin(placement_policy="cpu")


def test_asking_for_one_parameter_does_not_wait_for_the_updates_of_all() -> None:
    run = Trained(SMALL)
    run.step(0)
    chunks = boosted(run.model).manager.chunks
    assert len(chunks) > 1
    waited: list[int] = []
    for chunk in chunks:
        chunk.settle()
        chunk.update = RecordsWait(waited, chunk.index)
    next(run.model.parameters())
    assert waited == [boosted(run.model).manager.find(run.model[0].weight)[0].index]


class RecordsWait:
    def __init__(self, waited: list[int], index: int) -> None:
        self.waited, self.index = waited, index

    def wait(self) -> None:
        self.waited.append(self.index)

    def done(self) -> bool:
        return True
