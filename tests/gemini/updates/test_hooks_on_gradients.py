"""Hooks of the user's that run when a gradient has been accumulated find it in ``p.grad``, wherever its home is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import masters
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.updates.absent_gradient import AbsentGradient

pytestmark = [pytest.mark.one_in(3), pytest.mark.usefixtures("one_thread")]

WIDTH, LAYERS = 64, 5
PLACEMENTS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "disk": {"host_memory": "300KiB", "offload_dir": "disk"},
    "partly": {"host_memory": "320KiB", "offload_dir": "disk"},
    "streamed": {"host_memory": "300KiB", "offload_dir": "disk", "device_memory": "36KiB"},
    "in backward": {"update_in_backward": True, "host_memory": "300KiB", "offload_dir": "disk"},
}
Seen = list[Any]
Hook = Callable[[Tensor, Seen], None]


def gradient_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def reads(p: Tensor, seen: Seen) -> None:
    seen.append(gradient_of(p).clone())


def takes_the_norm(p: Tensor, seen: Seen) -> None:
    seen.append(gradient_of(p).norm().item())


def halves(p: Tensor, seen: Seen) -> None:
    gradient_of(p).mul_(0.5)


def clips(p: Tensor, seen: Seen) -> None:
    seen.append(clip_grad_norm_([p], 0.01).item())


def clips_by_value(p: Tensor, seen: Seen) -> None:
    torch.nn.utils.clip_grad_value_([p], 1e-3)


def replaces(p: Tensor, seen: Seen) -> None:
    p.grad = gradient_of(p) * 3


def gives_other_data(p: Tensor, seen: Seen) -> None:
    gradient_of(p).data = gradient_of(p) - 1


def forgets_weights(p: Tensor, seen: Seen) -> None:
    if p.dim() > 1:
        p.grad = None


def zeroes(p: Tensor, seen: Seen) -> None:
    gradient_of(p).zero_()


def scales_by_foreach(p: Tensor, seen: Seen) -> None:
    torch._foreach_mul_([gradient_of(p)], 0.25)
    seen.append(torch._foreach_norm([gradient_of(p)])[0].item())


def multiplies_by_the_weight(p: Tensor, seen: Seen) -> None:
    gradient_of(p).add_(p.detach(), alpha=1e-3)


def centres(p: Tensor, seen: Seen) -> None:
    gradient_of(p).sub_(gradient_of(p).mean())


HOOKS = [
    reads, takes_the_norm, halves, clips, clips_by_value, replaces, gives_other_data, forgets_weights, zeroes,
    scales_by_foreach, multiplies_by_the_weight, centres,
]  # fmt: skip


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


class Run:
    def __init__(self, placement: dict[str, Any] | None, folder: Path, hook: Hook | None, early: bool) -> None:
        self.model: Any = build()
        self.seen: dict[int, Seen] = {}
        self.parameters = list(self.model.parameters())
        self.optimizer: Any = HybridAdam(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.handles: list[Any] = []
        if early and hook is not None:
            self.register(hook)
        if placement is not None:
            options = {"precision": "fp32", "telemetry": False, "chunk_config_dict": {1: {"chunk_size": 1024}}}
            options |= placement
            if "offload_dir" in options:
                options["offload_dir"] = folder
            booster = Booster(plugin=GeminiPlugin(**options))
            self.model, self.optimizer, *_ = booster.boost(self.model, self.optimizer)
        if not early and hook is not None:
            self.register(hook)
        self.is_ours = placement is not None

    def register(self, hook: Hook) -> None:
        for index, p in enumerate(self.parameters):
            seen = self.seen.setdefault(index, [])
            self.handles.append(p.register_post_accumulate_grad_hook(lambda p, seen=seen: hook(p, seen)))

    def backward(self, step: int) -> None:
        loss = self.model(batch(step)).pow(2).sum() * 10
        self.optimizer.backward(loss) if self.is_ours else loss.backward()

    def step(self, step: int, backwards: int) -> None:
        for i in range(backwards):
            self.backward(10 * step + i)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return list(masters(self.model).values()) if self.is_ours else [p.detach() for p in self.parameters]


def check_same(ours: Run, plain: Run) -> None:
    for index, expected in plain.seen.items():
        assert len(ours.seen[index]) == len(expected)
        for one, other in zip(ours.seen[index], expected, strict=True):
            assert torch.equal(one, other) if isinstance(other, Tensor) else one == other
    assert all(map(torch.equal, ours.weights(), plain.weights()))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("early", [False, True], ids=["after boost", "before boost"])
@pytest.mark.parametrize(
    ("placement", "backwards"),
    [(name, count) for name in PLACEMENTS for count in (1, 2) if (name, count) != ("in backward", 2)],
)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_after_accumulation_sees_and_changes_the_gradient(
    hook: Hook, placement: str, backwards: int, early: bool, tmp_path: Path
) -> None:
    ours, plain = Run(PLACEMENTS[placement], tmp_path, hook, early), Run(None, tmp_path, hook, early)
    for run in (ours, plain):
        for step in range(3):
            run.step(step, backwards)
    check_same(ours, plain)


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name not in ("roomy", "in backward")])
def test_hooks_come_and_go(placement: str, tmp_path: Path) -> None:
    ours, plain = (Run(each, tmp_path, None, False) for each in (PLACEMENTS[placement], None))
    for run in (ours, plain):
        run.step(0, 2)
        run.register(halves)
        run.backward(1)
        run.register(reads)
        run.backward(2)
        for handle in run.handles:
            handle.remove()
        run.backward(3)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step(4, 2)
    check_same(ours, plain)


def total_norm(run: Run) -> Any:
    return get_total_norm([gradient_of(p) for p in run.parameters])


def clip(run: Run) -> Any:
    return clip_grad_norm_(run.parameters, 1.0)


def clip_of_the_model(run: Run) -> Any:
    return clip_grad_norm_(run.model.parameters(), 1.0, foreach=True)


def norms(run: Run) -> Any:
    return torch.stack([gradient_of(p).norm() for p in run.model.parameters()])


def foreach_norms(run: Run) -> Any:
    return torch.stack(torch._foreach_norm([gradient_of(p) for p in run.parameters]))


def clip_with_norms(run: Run) -> Any:
    norm = total_norm(run)
    torch.nn.utils.clip_grads_with_norm_(run.parameters, 0.5, norm)
    return norm


def unscaled(run: Run) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(run.optimizer)
    return norms(run)


def flattened(run: Run) -> Any:
    return torch.nn.utils.parameters_to_vector([gradient_of(p) for p in run.parameters])


def norm_of_some(run: Run) -> Any:
    return get_total_norm([gradient_of(p) for p in run.parameters[::3]], norm_type=1.0)


def all_finite(run: Run) -> Any:
    return torch.stack([gradient_of(p).isfinite().all() for p in run.parameters])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "in backward"])
@pytest.mark.parametrize(
    "use",
    [
        total_norm, clip, clip_of_the_model, norms, foreach_norms, clip_with_norms, unscaled, flattened, norm_of_some,
        all_finite,
    ],
)  # fmt: skip
def test_what_reads_all_gradients_between_backward_and_step(use: Any, placement: str, tmp_path: Path) -> None:
    ours, plain = (Run(each, tmp_path, None, False) for each in (PLACEMENTS[placement], None))
    for run in (ours, plain):
        for step in range(3):
            run.backward(2 * step)
            run.backward(2 * step + 1)
            run.seen.setdefault(0, []).append(use(run))
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_gradients_are_on_disk_where_these_tests_say_so(tmp_path: Path) -> None:
    for name, least, most in (("disk", 2 * LAYERS, 2 * LAYERS), ("partly", 1, 2 * LAYERS - 1)):
        run = Run(PLACEMENTS[name], tmp_path, None, False)
        run.backward(0)
        slots = [boosted(run.model).engine.updates.gradients.slot(p) for p in run.parameters]
        assert least <= sum(isinstance(slot.content, AbsentGradient) for slot in slots) <= most
