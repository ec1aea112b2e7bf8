"""The command line of the job, checked, as one frozen value."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gemini.arguments.command_line import Parser, option
from gemini.arguments.places import Folder, Name
from gemini.arguments.rules import Real, Size, Whole
from gemini.checkpoint import is_checkpoint
from gemini.errors import CheckpointError
from gemini.train import checkpoints
from gemini.train.model import GPTConfig

_EPILOG = """\
examples:
  python -m gemini.train                                     a small GPT, about a minute
  python -m gemini.train --layers 12 --hidden 768 --heads 12 --host-memory 500MiB
  python -m gemini.train --resume DIR --steps 400            go on where DIR ended
  python -m gemini.train --steps 10000 --save-every 500      lose 500 steps at most

SIZE is bytes or text: 24GiB is binary, 24GB decimal. Ctrl-C finishes the step,
writes the checkpoint and exits with 130; pressed twice it ends at once.
exit codes: 0 ok, 1 it could not be done, 2 wrong usage, 130 interrupted
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to train, on what, with how much memory."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    seq_len: int = 128
    batch_size: int = 8
    steps: int = 100
    lr: float = 3e-4
    seed: int = 0
    precision: str = "bf16"
    text: Path | None = None
    """None: the Python reference."""
    placement_policy: str = "auto"
    device_memory: int | None = None
    host_memory: int | None = None
    disk_memory: int | None = None
    offload_dir: Path | None = None
    """None: a temporary folder."""
    checkpoint: Path | None = None
    """None: a new folder below ``gemini_memory_runs``."""
    resume: Path | None = None
    """A checkpoint, or a folder of them."""
    save_every: int | None = None
    """Steps; None: only at the end."""
    keep: int = 3
    sample_length: int = 64
    json: bool = False

    @property
    def model(self) -> GPTConfig:
        return GPTConfig(layers=self.layers, hidden=self.hidden, heads=self.heads, seq_len=self.seq_len)

    @property
    def checkpoint_folder(self) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint
        if self.resume is not None:
            return checkpoints.folder_of(self.resume)
        return Path("gemini_memory_runs") / f"train-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint and for ``--json``; paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


SHAPE = ("layers", "hidden", "heads", "seq_len")
"""What a checkpoint fixes."""
REMEMBERED = (*SHAPE, "batch_size", "steps", "lr", "seed", "precision", "text", "save_every", "keep")
"""What ``--resume`` takes from the checkpoint where the command line does not say otherwise."""


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; a mistake ends the program with exit code 2 and one line that names it."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))  # only what was given: every default is SUPPRESS
    try:
        options = Options(**{**_remembered(given), **given})
        _check(options)
    except (ValueError, OSError, CheckpointError) as error:
        parser.error(str(error))
    return options


def _parser() -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in fields(Options)}
    parser = Parser(
        prog="python -m gemini.train",
        usage="python -m gemini.train [options]",
        description="Train a GPT on text in less memory than its model data need, and show that it is so.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: Any, flag: str, kind: Callable[[str], Any], metavar: str, text: str) -> None:
        default = defaults[flag[2:].replace("-", "_")]
        shown = "" if default is None else f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
        group.add_argument(flag, type=kind, metavar=metavar, help=text + shown)

    model = parser.add_argument_group("model and training")
    add(model, "--layers", option(Whole(1)), "N", "transformer blocks")
    add(model, "--hidden", option(Whole(1)), "N", "width; a multiple of the heads")
    add(model, "--heads", option(Whole(1)), "N", "attention heads")
    add(model, "--seq-len", option(Whole(1)), "N", "bytes a sequence")
    add(model, "--batch-size", option(Whole(1)), "N", "sequences a step, on each rank")
    add(model, "--steps", option(Whole(1)), "N", "steps in all")
    add(
        model,
        "--lr",
        option(Real(0, 10, has_low=False, has_high=False)),
        "X",
        "highest learning rate; warms up, then falls along a cosine",
    )
    add(model, "--seed", option(Whole()), "N", "of the weights and of the order of the data")
    model.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="of the computation [bf16]")
    add(model, "--text", option(Name()), "FILE", "train on this file [Python's own reference]")
    memory = parser.add_argument_group("memory for model data")
    add(memory, "--device-memory", option(Size()), "SIZE", "on the device; without a GPU, emulates one")
    add(memory, "--host-memory", option(Size()), "SIZE", "in RAM [without a GPU: half of the model data]")
    add(memory, "--disk-memory", option(Size()), "SIZE", "in the offload folder [what is free]")
    add(memory, "--offload-dir", option(Folder()), "DIR", "folder of the disk tier [a temporary one]")
    memory.add_argument("--placement-policy", choices=("auto", "static"), help="[auto]")
    output = parser.add_argument_group("output")
    add(output, "--checkpoint", option(Folder()), "DIR", "write checkpoints here [a new folder in gemini_memory_runs]")
    add(
        output, "--resume", option(Name()), "DIR", "go on from the newest checkpoint here, or this one (and write here)"
    )
    add(output, "--save-every", option(Whole(1)), "N", "write one every N steps too")
    add(output, "--keep", option(Whole(1)), "N", "how many stay, the newest ones")
    add(output, "--sample-length", option(Whole()), "N", "bytes of text to generate at the end")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout, the rest on stderr")
    return parser


def _remembered(given: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint to resume says; ``ValueError`` if the command line asks for another model."""
    folder: Path | None = given.get("resume")
    if folder is None:
        return {}
    try:
        saved = read_state(folder)["options"]
    except (ValueError, OSError, CheckpointError) as error:
        raise ValueError(f"--resume {folder}: {error}") from error
    for name in SHAPE:
        if given.get(name, saved[name]) != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {given[name]} does not fit {folder}, whose model has {saved[name]}; leave it out")
    known = {name: saved[name] for name in REMEMBERED if saved.get(name) is not None}
    if "text" in known:
        known["text"] = Path(known["text"])
    return known


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the job that wrote it; see `checkpoints.read_state`."""
    return checkpoints.read_state(checkpoint, SHAPE)


def _check(options: Options) -> None:
    _ = options.model  # hidden and heads fit
    if options.text is not None and not options.text.is_file():
        raise ValueError(f"--text {options.text}: no such file")
    target = options.checkpoint_folder
    if is_checkpoint(target):
        raise ValueError(f"--checkpoint {target}: is one checkpoint; give the folder of them, {target.parent}")
    if target.is_dir() and any(target.iterdir()) and not checkpoints.holds_checkpoints(target):
        raise ValueError(f"--checkpoint {target}: holds other files; give an empty or a new folder")
