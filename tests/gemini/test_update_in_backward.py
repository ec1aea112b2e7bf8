"""``update_in_backward=True``: the numbers of the normal step, while gradients never are there all at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, WIDTH, Trained, batch, check_same
from parity import Task, check_at_rest, check_equal, masters, run_managed, run_plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.errors import OutOfMemory, TornStep
from gemini.nn.optimizer import HybridAdam
from gemini.updates.backward_updates import Progress
from gemini.updates.gradients import AbsentGradient

pytestmark = pytest.mark.timeout(60)

STEPS = 4
SMALL = {"chunk_config_dict": {1: {"chunk_size": 1024}}}
MORE_PLACEMENTS = {
    **PLACEMENTS,
    "resident": SMALL,
    "disk, but gradients": {**PLACEMENTS["disk"], "host_memory": "420KiB"},
}
BY_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=["streamed"])
def placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    chosen = MORE_PLACEMENTS[request.param]
    return {**chosen, "offload_dir": tmp_path} if "offload_dir" in chosen else chosen


everywhere = pytest.mark.parametrize("placement", MORE_PLACEMENTS, indirect=True)


class Run(Trained):
    """Without dropout, so that two of them can take turns."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(m for m in super().build_model() if not isinstance(m, nn.Dropout)))


def in_backward(placement: dict[str, Any], precision: str = "fp32") -> Run:
    return Run(placement, precision, update_in_backward=True)


def updates_of(model: nn.Module) -> Any:
    return boosted(model).step.in_backward


def trainable(model: nn.Module) -> int:
    return sum(chunk.is_trainable for chunk in boosted(model).manager.chunks)


# -- the same numbers


@everywhere
@pytest.mark.parametrize("precision", BY_PRECISION)
def test_it_trains_as_the_normal_step_does(placement: dict[str, Any], precision: str) -> None:
    ours = Trained(placement, precision, update_in_backward=True)
    losses = [ours.step(step) for step in range(STEPS)]
    normal = Trained({}, precision)
    assert losses == [normal.step(step) for step in range(STEPS)]
    assert updates_of(ours.model).update_count == STEPS * trainable(ours.model)  # all of them within backward
    check_at_rest(ours.model)
    theirs = normal.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]
    for mine, other in zip(states(ours), states(normal), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def states(run: Trained) -> list[dict[str, Tensor]]:
    return list(run.optimizer.state_dict()["state"].values())


class Odd(nn.Module):
    """Tied weights, a layer used three times, checkpoints, a part used by turns, one frozen, one without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.use_reentrant: bool | None = None
        self.calls = 0

    def body(self, x: Tensor, block: nn.Module) -> Tensor:
        return torch.tanh(self.shared(block(x))) * self.scale

    def forward(self, index: Tensor) -> Tensor:
        self.calls += 1
        x = self.table(index)
        x = self.frozen(torch.tanh(self.first(x)))
        for block in self.blocks:
            if self.use_reentrant is None:
                x = self.body(x, block)
            else:
                x = checkpoint(self.body, x, block, use_reentrant=self.use_reentrant)
        with torch.no_grad():
            target = self.teacher(x)
        if self.calls % 2 == 0:
            x = x + self.unused(x)
        loss = nn.functional.cross_entropy(self.head(x), (index + 1) % 32)
        return loss + (self.teacher(x) - target).square().mean() + (x - target).square().mean()


def odd(use_reentrant: bool | None, precision: str) -> Task:
    def prepare(model: Any) -> None:
        model.use_reentrant = use_reentrant

    batches = [torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
    return Task(Odd, batches, lambda model, index: model(index), precision, prepare=prepare)


ODD_PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "100KiB"},
    "disk": {"host_memory": "500KiB", "offload_dir": "disk"},
}


@pytest.mark.parametrize("precision", BY_PRECISION)
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("where", ODD_PLACEMENTS)
def test_odd_uses_of_parameters_train_as_in_plain_pytorch(
    where: str, use_reentrant: bool | None, precision: str, tmp_path: Any
) -> None:
    options = {**ODD_PLACEMENTS[where], **SMALL}
    if "offload_dir" in options:
        options["offload_dir"] = tmp_path
    task = odd(use_reentrant, precision)
    run, model = run_managed(task, update_in_backward=True, **options)
    check_equal(run, run_plain(task))
    # What waits for the step: the teacher's chunks, since a call without a graph might have been a checkpoint's, and in
    # half of the steps the unused layer's, which has nothing to be updated then.
    count = updates_of(model).update_count
    assert STEPS * (trainable(model) - 4) <= count < STEPS * trainable(model)


@everywhere
def test_the_options_are_those_of_this_step(placement: dict[str, Any]) -> None:
    def train(run: Trained) -> list[float]:
        scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (step + 1))
        losses = []
        for step in range(STEPS):
            losses.append(run.step(step))
            scheduler.step()
        return losses

    ours, plain = in_backward(placement), Run(None)
    assert train(ours) == train(plain)
    check_same(ours, plain)


def test_groups_have_their_own_options_and_chunks(placement: dict[str, Any]) -> None:
    def run(managed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "lr": 0.1, "betas": (0.8, 0.9)}]
        optimizer: Any = HybridAdam(groups, lr=1e-2)
        if managed:
            plugin = GeminiPlugin(precision="fp32", telemetry=False, update_in_backward=True, **placement)
            model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
        for step in range(STEPS):
            model(batch(step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if managed:
            assert updates_of(model).update_count == STEPS * trainable(model)
        return masters(model) if managed else {n: p.detach().clone() for n, p in model.named_parameters()}

    ours, plain = run(True), run(False)
    assert not [name for name in plain if not torch.equal(ours[name], plain[name])]


def test_a_parameter_outside_of_the_chunks_waits_for_the_step() -> None:
    def train(run: Trained) -> Tensor:
        double = nn.Parameter(torch.ones(8, dtype=torch.float64))
        run.optimizer.add_param_group({"params": [double]})
        for step in range(STEPS):
            run.backward(run.loss(step) + (double * step).sum())
            run.optimizer.step()
            run.optimizer.zero_grad()
        return double.detach()

    ours, plain = in_backward(PLACEMENTS["streamed"]), Run(None)
    assert torch.equal(train(ours), train(plain))
    check_same(ours, plain)


def test_two_forwards_before_one_backward_work(placement: dict[str, Any]) -> None:
    def train(run: Trained) -> None:
        for step in range(STEPS):
            run.backward(run.loss(2 * step) + run.loss(2 * step + 1))
            run.optimizer.step()
            run.optimizer.zero_grad()

    ours, plain = in_backward(placement), Run(None)
    train(ours), train(plain)
    check_same(ours, plain)


def test_a_closure_and_a_double_backward_work() -> None:
    def train(run: Trained) -> None:
        for step in range(STEPS):

            def closure(step: int = step) -> Tensor:
                run.optimizer.zero_grad()
                x = batch(step).requires_grad_()
                loss = run.model(x).square().mean()
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
                run.backward(loss)
                return loss

            run.optimizer.step(closure)

    ours, plain = in_backward(SMALL), Run(None)
    train(ours), train(plain)
    check_same(ours, plain)


def test_evaluation_between_steps_changes_nothing(placement: dict[str, Any]) -> None:
    ours, plain = in_backward(placement), Run(None)
    for step in range(STEPS):
        assert ours.step(step) == plain.step(step)
        outputs = []
        for run in (ours, plain):
            run.model.eval()
            with torch.no_grad():
                outputs.append(run.model(batch(step)))
            run.model.train()
        assert torch.equal(*outputs)
    check_same(ours, plain)


# -- room


def test_gradients_are_there_for_a_few_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = {"device_memory": "36KiB", **SMALL}
    ours = in_backward(placement)
    manager = boosted(ours.model).manager
    all_bytes = sum(chunk.layout.numel * 4 for chunk in manager.chunks)
    assert 0 < manager.gradient_pool.nbytes_on(Tier.HOST) < all_bytes / 2
    assert ours.model.memory_stats()["model_data/gradient_bytes"] == manager.gradient_pool.nbytes
    before = manager.ledger.used(Tier.HOST)
    ours.step(0)
    manager.settle()
    assert manager.ledger.used(Tier.HOST) == before  # and did not have to grow
    assert manager.gradient_pool.growths == 0


def test_a_smaller_capacity_is_enough() -> None:
    """Without a home for every gradient, the same model fits less memory."""

    def least(**plugin: Any) -> int:
        low, high = 0, 1 << 20
        while high - low > 1024:
            middle = (low + high) // 2
            try:
                Run({"host_memory": middle, **SMALL}, "bf16", **plugin).step(0)
                high = middle
            except OutOfMemory:
                low = middle
        return high

    normal, ours = least(), least(update_in_backward=True)
    numel = sum(p.numel() for p in Run(None).model.parameters())
    assert normal - ours > numel  # half of the two bytes a parameter


class Later(nn.Module):
    """Runs its layers in another order than it has them, so that the guess of the room is too low."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for i in (*range(0, 12, 2), *range(1, 12, 2)):
            x = torch.tanh(self.layers[i](x))
        return x


def later() -> Task:
    return Task(Later, [batch(i) for i in range(STEPS)], lambda model, x: model(x).square().mean())


@pytest.mark.parametrize("has_disk", [False, True])
def test_a_guess_that_was_too_low_grows_or_goes_to_disk(has_disk: bool, tmp_path: Any) -> None:
    two_each = {"chunk_config_dict": {1: {"chunk_size": 2 * WIDTH * WIDTH}}}  # of neighbours that run far apart
    placement: dict[str, Any] = {"offload_dir": tmp_path, "host_memory": "560KiB"} if has_disk else {}
    run, model = run_managed(later(), update_in_backward=True, **two_each, **placement)
    check_equal(run, run_plain(later()))
    assert boosted(model).manager.gradient_pool.growths > 0


def test_where_there_is_no_room_to_grow_the_message_says_how_much_is_enough() -> None:
    two_each = {"chunk_config_dict": {1: {"chunk_size": 2 * WIDTH * WIDTH}}}
    capacity = 500 << 10
    for _ in range(20):
        try:
            run, _ = run_managed(later(), update_in_backward=True, host_memory=capacity, **two_each)
            break
        except OutOfMemory as error:
            text = str(error)
            assert "host_memory to " in text, text
            enough = int(text.split("host_memory to ")[1].split()[0])
            assert enough > capacity
            capacity = enough
    check_equal(run, run_plain(later()))


# -- what cannot be


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"enable_gradient_accumulation": True}, "enable_gradient_accumulation"),
    ],
)
def test_what_needs_all_gradients_is_refused_at_once(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"update_in_backward=True cannot go with {named}"):
        GeminiPlugin(update_in_backward=True, **arguments)


def test_no_sync_and_clipping_are_refused_before_anything_happens(placement: dict[str, Any]) -> None:
    ours, plain = in_backward(placement), Run(None)
    ours.step(0), plain.step(0)
    with pytest.raises(ValueError, match=r"no_sync.*boost without it"):
        ours.booster.no_sync(ours.model, ours.optimizer)
    for clip in (ours.optimizer.clip_grad_by_norm, ours.optimizer.clip_grad_by_value):
        with pytest.raises(ValueError, match=r"cannot be clipped with update_in_backward=True"):
            clip(1.0)
    loss = ours.loss(1)
    ours.backward(loss)
    with pytest.raises(ValueError, match="cannot be clipped"):
        ours.optimizer.clip_grad_by_norm(1.0)
    ours.optimizer.step()  # goes on as if nothing had been asked
    ours.optimizer.zero_grad()
    plain.step(1)
    check_same(ours, plain)


def parameters_of(run: Trained) -> list[nn.Parameter]:
    return [binding.parameter for chunk in boosted(run.model).manager.chunks for binding in chunk.bindings]  # type: ignore[misc]


def test_clipping_with_torch_and_a_scaler_fail_loudly(placement: dict[str, Any]) -> None:
    ours = in_backward(placement)
    kept = parameters_of(ours)
    ours.backward(ours.loss(0))
    assert all(isinstance(p.grad, AbsentGradient) for p in kept)
    with pytest.raises(RuntimeError, match=r"uses it up within backward.*boost without it"):
        torch.nn.utils.clip_grad_norm_(kept, 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="uses it up within backward"):
        scaler.unscale_(ours.optimizer)


SECONDS: dict[str, Callable[[Trained], Any]] = {
    "booster.backward": lambda run: run.backward(run.first_loss),  # type: ignore[attr-defined]
    "loss.backward": lambda run: run.first_loss.backward(),  # type: ignore[attr-defined]
    "forward": lambda run: run.loss(1),
    "evaluation": lambda run: run.model.eval()(batch(0)),
    "state_dict": lambda run: run.model.state_dict(),
    "optimizer.state_dict": lambda run: run.optimizer.state_dict(),
    "zero_grad": lambda run: run.optimizer.zero_grad(),
    "model.zero_grad": lambda run: run.model.zero_grad(),
}


@pytest.mark.parametrize("second", SECONDS.values(), ids=SECONDS)
def test_between_backward_and_step_what_would_mix_two_steps_is_refused_and_the_step_can_go_on(
    second: Callable[[Trained], Any], placement: dict[str, Any]
) -> None:
    ours, plain = in_backward(placement), Run(None)
    loss = ours.loss(0)
    loss.backward(retain_graph=True)
    ours.first_loss = loss  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"update_in_backward=True.*call optimizer.step\(\)"):
        second(ours)
    ours.model.train()
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(0)
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


@everywhere
def test_a_second_backward_through_updated_weights_is_refused_after_the_step_too(placement: dict[str, Any]) -> None:
    ours = in_backward(placement)
    loss = ours.loss(0)
    loss.backward(retain_graph=True)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_zero_grad_the_next_backward_is_refused(placement: dict[str, Any]) -> None:
    ours, plain = in_backward(placement), Run(None)
    ours.backward(ours.loss(0))
    ours.optimizer.step()
    plain.step(0)
    loss = ours.loss(1)
    with pytest.raises(ValueError, match=r"was not zeroed since the last step.*optimizer.zero_grad\(\)"):
        ours.backward(loss)
    for parameter in parameters_of(ours):
        parameter.grad = None  # as good as zero_grad
    ours.backward(loss)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(1)
    check_same(ours, plain)


def test_options_that_change_between_backward_and_step_are_refused(placement: dict[str, Any]) -> None:
    ours, plain = in_backward(placement), Run(None)
    ours.backward(ours.loss(0))
    ours.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr of group 0 was 0.01 when backward updated.*and is 0.5 now"):
        ours.optimizer.step()
    ours.optimizer.param_groups[0]["lr"] = 0.01
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(0)
    ours.optimizer.param_groups[0]["lr"] = plain.optimizer.param_groups[0]["lr"] = 0.5
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


@pytest.mark.parametrize("value", [None, torch.zeros(WIDTH)], ids=["forgotten", "replaced"])
def test_gradients_that_are_changed_after_their_use_are_refused(value: Any, placement: dict[str, Any]) -> None:
    ours = in_backward(placement)
    bias = next(p for p in parameters_of(ours) if p.shape == (WIDTH,))
    ours.backward(ours.loss(0))
    shown, bias.grad = bias.grad, value
    with pytest.raises(ValueError, match=r"bias was changed between backward and step\(\)"):
        ours.optimizer.step()
    bias.grad = shown
    ours.optimizer.step()


# -- a torn step


class Fails(nn.Module):
    """Passes on, and fails in a chosen backward."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(self.backward_hook)
        return x

    def backward_hook(self, gradient: Tensor) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Breaking(Run):
    """Has a place in its backward that can fail, when some of it has run."""

    def __init__(self, placement: dict[str, Any] | None, at: int, **plugin: Any) -> None:
        self.at = at
        super().__init__(placement, **plugin)
        self.fails = self.model[self.at]

    def build_model(self) -> nn.Module:
        model = super().build_model()
        return nn.Sequential(*list(model)[: self.at], Fails(), *list(model)[self.at :])


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: ValueError("on purpose"),
    "out of memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "an interrupt": KeyboardInterrupt,
}


@everywhere
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("plain_backward", [False, True])
def test_a_backward_that_fails_half_way_leaves_a_torn_step_that_is_told_and_loading_heals(
    error: Callable[[], BaseException], plain_backward: bool, placement: dict[str, Any], tmp_path: Any
) -> None:
    ours, plain = Breaking(placement, at=6, update_in_backward=True), Breaking(None, at=6)
    assert [ours.step(i) for i in range(2)] == [plain.step(i) for i in range(2)]
    ours.booster.save_model(ours.model, str(tmp_path / "saved"))
    ours.booster.save_optimizer(ours.optimizer, str(tmp_path / "saved"))
    ours.fails.error = error()
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)) as caught:
        ours.loss(2).backward() if plain_backward else ours.backward(ours.loss(2))
    if not plain_backward and isinstance(caught.value, OutOfMemory):
        assert "of no single step" in str(caught.value) and "untouched" not in str(caught.value)
    torn = r"backward failed in step 3 .*update_in_backward=True.*load a checkpoint.*load_model and booster.load_optim"
    for use in (
        lambda: ours.loss(3),
        lambda: ours.optimizer.step(),
        lambda: ours.model.state_dict(),
        lambda: ours.booster.save_model(ours.model, str(tmp_path / "other")),
        lambda: ours.optimizer.state_dict(),
        lambda: ours.model.eval()(batch(0)),
    ):
        with pytest.raises(TornStep, match=torn):
            use()
    ours.model.train()
    ours.booster.load_model(ours.model, str(tmp_path / "saved"))
    with pytest.raises(TornStep):
        ours.loss(3)  # the states are torn still
    ours.booster.load_optimizer(ours.optimizer, str(tmp_path / "saved"))
    assert updates_of(ours.model).progress is Progress.WHOLE
    ours.optimizer.zero_grad()
    assert [ours.step(i) for i in range(2, 4)] == [plain.step(i) for i in range(2, 4)]
    check_same(ours, plain)


def test_a_backward_that_fails_before_the_first_update_leaves_everything_whole(placement: dict[str, Any]) -> None:
    ours, plain = Breaking(placement, at=12, update_in_backward=True), Breaking(None, at=12)
    assert ours.step(0) == plain.step(0)
    ours.fails.error = ValueError("on purpose")
    with pytest.raises(ValueError, match="on purpose"):
        ours.backward(ours.loss(1))
    assert [ours.step(i) for i in range(1, 3)] == [plain.step(i) for i in range(1, 3)]
    check_same(ours, plain)


def test_code_that_forward_did_not_show_is_refused_within_backward() -> None:
    """A module that runs in backward only, after its weights were updated: its numbers would be of another step."""
    torch.manual_seed(0)
    inner = nn.Linear(WIDTH, WIDTH, bias=False)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with torch.no_grad():
                return gradient + inner(gradient)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(Again.apply(self.first(x))))  # type: ignore[no-any-return]

    model: Any = Model()
    plugin = GeminiPlugin(precision="fp32", telemetry=False, update_in_backward=True, **SMALL)
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=r"inner, run again by backward, uses chunk .* when backward has updated it"):
        model(batch(0)).sum().backward()
    with pytest.raises(TornStep):
        optimizer.step()
