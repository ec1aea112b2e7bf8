"""Steps in which one operation fails, beside plain PyTorch: what became of each."""

import gc
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fault_sites import Fault, Interpreter, interpreter
from loop import PLACEMENTS, Trained, batch
from parity import check_at_rest
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import GradientBuffer, Tier
from gemini.errors import GeminiError, TornStep
from gemini.nn.optimizer import HybridAdam

Once = Callable[["Pair", Fault, int, dict[str, Any]], "Outcome"]
Site = Callable[[Fault], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A placement, and how it is trained."""

    placement: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    repeats: int = 1
    """Times the layers of the loop's model."""


FOUR: dict[str, dict[str, Any]] = {
    **PLACEMENTS,
    "activations": {**PLACEMENTS["disk"], "activation_policy": "offload"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {"micro_batches": 2},
    "in backward": {"options": {"update_in_backward": True}},
}
SETTINGS: dict[str, Setting] = {
    **{
        f"{placement}, {variant}": Setting(placement=placement, **what)
        for placement in FOUR
        for variant, what in VARIANTS.items()
    },
    "resident, split masters": Setting(placement="resident", precision="bf16", options={"split_master": True}),
    "disk, split masters": Setting(
        placement="disk", precision="bf16", options={"split_master": True, "host_memory": "640KiB"}, repeats=3
    ),
    "disk, checksums": Setting(placement="disk", options={"disk_checksums": True}),
    "disk, gradients on disk": Setting(placement="disk", options={"host_memory": "240KiB"}, micro_batches=2),
}


class Both(Trained):
    """One of the two trainings. Both begin with the same values, also where a dtype rounds them."""

    def __init__(self, setting: Setting, is_managed: bool) -> None:
        self.setting = setting
        self.is_managed = is_managed
        self.model: Any = self.build_model()
        self.optimizer: Any = self.make_optimizer(self.model)

    def boost(self) -> None:
        placement = {**FOUR[self.setting.placement], **self.setting.options}
        plugin = GeminiPlugin(precision=self.setting.precision, telemetry=False, **placement)
        self.booster = Booster(plugin=plugin)
        self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)

    @property
    def is_bf16(self) -> bool:
        return self.setting.precision == "bf16"

    def build_model(self) -> nn.Module:
        model = super().build_model()
        if self.setting.repeats > 1:
            bodies = [list(super(Both, self).build_model())[:-2] for _ in range(self.setting.repeats)]
            model = nn.Sequential(*(layer for body in bodies for layer in body))
        if self.is_bf16:
            for parameter in model.parameters():
                rounded = parameter.data.bfloat16()
                parameter.data = rounded.float() if self.is_managed else rounded
        return model

    def loss(self, step: int) -> Tensor:
        x = batch(step)
        if self.is_bf16 and not self.is_managed:
            x = x.bfloat16()
        return self.model(x).float().square().mean()  # type: ignore[no-any-return]

    def weights(self) -> dict[str, Tensor]:
        if self.is_managed:
            return super().weights()
        states = self.optimizer.state
        return {name: states.get(p, {}).get("master", p).detach().clone() for name, p in self.model.named_parameters()}

    def forward_and_backward(self, number: int) -> list[float]:
        losses = []
        for micro in range(self.setting.micro_batches):
            torch.manual_seed(100 * number + micro)  # dropout, the same in each attempt
            loss = self.loss(100 * number + micro)
            self.backward(loss)
            losses.append(loss.item())
        return losses

    def whole_step(self, number: int) -> list[float]:
        losses = self.forward_and_backward(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Broken(AssertionError):
    """Something that must not be."""


ROOT = Path(__file__).resolve().parents[1]


class Told:
    """An error that the user caught. The frames that it held are let go, as a user's are."""

    def __init__(self, error: BaseException) -> None:
        self.text = f"{type(error).__name__}: {error}"
        self.trace = "".join(traceback.format_exception(error))
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = tuple(f"{ROOT}/{folder}/" for folder in ("gemini", "chunk", "lazy"))
        self.is_untyped = not isinstance(error, GeminiError) and any(file.startswith(ours) for file in files)
        """True for an error of code of ours that is not one of `gemini.errors`."""
        each: BaseException | None = error
        while each is not None:
            each.__traceback__ = None
            each = each.__cause__ or each.__context__

    def __repr__(self) -> str:
        return self.text[:300]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step."""

    happened: bool
    errors: tuple[Told, ...]
    """In their order."""
    is_injected: bool
    is_torn: bool = False


class Pair:
    """A managed training and a plain one, which take the same steps."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.plain = Both(setting, is_managed=False)
        self.ours = Both(setting, is_managed=True)
        self.number = 0

    def faulty_boost(self, site: Site, fault: Fault, at: int, held: dict[str, Any]) -> Outcome:
        """Boost, while one operation fails; again if that is an error."""
        errors: list[Told] = []
        values = {name: p.detach().clone() for name, p in self.ours.model.named_parameters()}
        with site(fault):
            fault.arm(at)
            try:
                self.ours.boost()
            except Exception as error:
                errors.append(Told(error))
            is_injected = fault.is_over
            fault.disarm()
        if errors:
            model, optimizer = self.ours.model, self.ours.optimizer
            if type(model) is not nn.Sequential or type(optimizer) is not HybridAdam:
                raise Broken(f"boost failed and left {type(model)} and {type(optimizer)}")
            if not same(values, dict(model.named_parameters())):
                raise Broken(f"boost failed and changed the model; {errors[0]!r}")
            if (now := _after_collection(held)) != held:
                raise Broken(f"boost failed and holds {now}, before it {held}; {errors[0]!r}")
            self.ours.boost()
        self.go_on()
        self.go_on()
        check_at_rest(self.ours.model)
        if not same(self.ours.weights(), self.plain.weights()):
            raise Broken("weights differ after two steps")
        return Outcome(not errors, tuple(errors), is_injected)

    def go_on(self) -> None:
        """Take a step in which nothing fails."""
        expected, losses = self.plain.whole_step(self.number), self.ours.whole_step(self.number)
        if losses != expected:
            raise Broken(f"step {self.number}: losses {losses}, plain PyTorch has {expected}")
        self.number += 1

    def rest(self) -> dict[str, Any]:
        """What is held between two steps."""
        check_at_rest(self.ours.model)
        whole = boosted(self.ours.model)
        manager, queue = whole.manager, whole.step._updater._queue
        stagings = [queue._staging, manager.device._staging, manager.device._store._staging]
        homes = [home for chunk in manager.chunks for home in chunk.homes.values()]
        gradients = [c.gradient for c in manager.chunks if isinstance(c.gradient, GradientBuffer)]
        homes += [g.buffer for g in gradients if g.buffer is not None and not g.is_borrowed]
        in_homes = sum(part.nbytes for home in homes for part in home.parts if part.tier is Tier.HOST)
        return {
            # Homes may have moved to the disk, or back.
            "host": manager.ledger._used[Tier.HOST] - in_homes - manager.gradient_pool.nbytes_on(Tier.HOST),
            "activations": (whole.saving.counts.disk_bytes, whole.saving.counts.host_bytes),
            "staging": [None if each is None else each.free_count for each in stagings],
            **({} if whole.saving.counts.switch_count else _held_of_the_system()),
            "in update": len(queue._pipeline._waiting),
        }

    def faulty_step(self, site: Site, fault: Fault, at: int) -> Outcome:
        """Take a step one operation of which fails, and as a user would, give it up or have it."""
        before = self.plain.weights()
        saved = None
        if self.setting.options.get("update_in_backward"):
            saved = self.ours.model.state_dict(), self.ours.optimizer.state_dict()
            saved = {k: v.clone() for k, v in saved[0].items()}, saved[1]
        expected = self.plain.whole_step(self.number)
        after = self.plain.weights()
        errors: list[Told] = []
        happened, losses = False, None
        with site(fault):
            fault.arm(at)
            try:
                losses = self.ours.forward_and_backward(self.number)
                self.ours.optimizer.step()
                happened = True
                self.ours.optimizer.zero_grad()
                check_at_rest(self.ours.model)
            except Exception as error:
                errors.append(Told(error))
            is_injected = fault.is_over
            fault.disarm()
        if losses is not None and losses != expected:
            raise Broken(f"losses {losses} in the step itself, plain PyTorch has {expected}")
        torn = boosted(self.ours.model).engine.updates.schedule.torn_text
        if torn:
            self._come_back(saved)
            happened = False
        else:
            for _ in range(3):
                try:
                    self.ours.optimizer.zero_grad()
                    check_at_rest(self.ours.model)
                    break
                except (GeminiError, MemoryError, OSError) as error:
                    errors.append(Told(error))  # of an update that is tried again
                except AssertionError:
                    if not isinstance(fault, Interpreter):
                        raise
                    break  # between any two instructions, as an interrupt: the next forward mends it
            else:
                raise Broken(f"does not come to rest: {errors}")
        found = self.ours.weights()
        if not happened and not same(found, before):
            if same(found, after):
                raise Broken(f"the step happened, and raised {errors[0]!r}")
            raise Broken(f"torn: neither before nor after the step; {errors!r}")
        if happened and not same(found, after):
            raise Broken(f"not what plain PyTorch has after the step; {errors!r}")
        if not happened:
            losses = self.ours.whole_step(self.number)
            if losses != expected:
                raise Broken(f"losses {losses} in the next attempt, plain PyTorch has {expected}; {errors!r}")
        self.number += 1
        return Outcome(happened, tuple(errors), is_injected, bool(torn))

    def _come_back(self, saved: Any) -> None:
        """A part of the step happened within backward: refused until what was saved is loaded."""
        try:
            self.ours.optimizer.zero_grad()
            self.ours.loss(0)
        except TornStep:
            pass
        else:
            raise Broken("a torn step is not refused")
        model, optimizer = saved
        self.ours.model.load_state_dict(model)
        self.ours.optimizer.load_state_dict(optimizer)

    def check(self, expected_rest: dict[str, Any]) -> None:
        """Go on, and have what plain PyTorch has."""
        self.go_on()
        gc.collect()
        rest = self.rest()
        if different := {k: (rest[k], expected_rest[k]) for k in rest if rest[k] != expected_rest[k]}:
            raise Broken(f"held at rest, and by a sound run: {different}")
        ours, plain = self.ours.weights(), self.plain.weights()
        if not same(ours, plain):
            raise Broken("weights differ one step later")


def _held_of_the_system() -> dict[str, Any]:
    """What grows once when memory has run out (a thread and a file for saved tensors), and else never."""
    return {
        "threads": sum("gemini" in thread.name for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def _after_collection(expected: dict[str, Any]) -> dict[str, Any]:
    """What is held when threads have had the time to end."""
    for attempt in range(7):
        gc.collect()
        if (now := _held_of_the_system()) == expected:
            break
        threading.Event().wait(0.005 * 2**attempt)
    return now


def settled(setting: Setting) -> tuple[Pair, dict[str, Any]]:
    """A pair after some sound steps, and what it holds at rest."""
    pair = Pair(setting)
    pair.ours.boost()
    for _ in range(3):
        pair.go_on()
    gc.collect()
    return pair, pair.rest()


def run_boosts(setting: Setting, site: Site, first: int, step: int) -> Iterator[tuple[int, Outcome | Broken]]:
    """Each operation of a boost fails once."""
    return _anew(setting, first, step, lambda pair, fault, at, held: pair.faulty_boost(site, fault, at, held))


def run_first_steps(setting: Setting, site: Site, first: int, step: int) -> Iterator[tuple[int, Outcome | Broken]]:
    """Each operation of the first step after a boost fails once."""

    def once(pair: Pair, fault: Fault, at: int, held: dict[str, Any]) -> Outcome:
        pair.ours.boost()
        outcome = pair.faulty_step(site, fault, at)
        pair.go_on()
        check_at_rest(pair.ours.model)
        if not same(pair.ours.weights(), pair.plain.weights()):
            raise Broken("weights differ one step later")
        return outcome

    return _anew(setting, first, step, once)


def _anew(setting: Setting, first: int, step: int, once: Once) -> Iterator[tuple[int, Outcome | Broken]]:
    """The same with a new pair each time."""
    sound = Pair(setting)
    sound.ours.boost()  # threads and kernels that a process has once
    sound.go_on()
    del sound
    gc.collect()
    threading.Event().wait(0.2)  # threads end
    held = _held_of_the_system()
    fault, at = Fault(), first
    while True:
        result = _attempt(once, setting, fault, at, held)
        yield at, result
        if not fault.is_over:
            return
        at += step


def _attempt(once: Once, setting: Setting, fault: Fault, at: int, held: dict[str, Any]) -> Outcome | Broken:
    _after_collection(held)
    try:
        return once(Pair(setting), fault, at, held)
    except Broken as broken:
        return broken
    except Exception as error:
        return Broken(_text(error))


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def fault_of(site: Site) -> Fault:
    """What makes an operation of this kind fail."""
    return Interpreter() if site is interpreter else Fault()


def run_steps(setting: Setting, site: Site, first: int, step: int) -> Iterator[tuple[int, Outcome | Broken]]:
    """Each operation of a step fails once, from number ``first`` on; of several, every ``step``-th."""
    fault, at = fault_of(site), first
    held = _held_of_the_system()
    pair, rest = settled(setting)
    while True:
        try:
            outcome = pair.faulty_step(site, fault, at)
            pair.check(rest)
        except Exception as error:
            broken = Broken(str(error) if isinstance(error, Broken) else _text(error))
            each: BaseException | None = error
            while each is not None:
                traceback.clear_frames(each.__traceback__)  # they hold the pair
                each = each.__cause__ or each.__context__
            del pair
            _after_collection(held)
            yield at, broken
            pair, rest = settled(setting)  # nothing can be said of what comes after it
            if not fault.is_over:
                return
        else:
            if isinstance(fault, Interpreter):
                fault.saw(bool(outcome.errors))
            yield at, replace(outcome, is_injected=fault.is_over)
            if not fault.is_over:
                return
        at += step
