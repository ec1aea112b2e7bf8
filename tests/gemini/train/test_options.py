"""The command line and the data of the main job."""

import json
from pathlib import Path

import pytest
import torch

from gemini.train.checkpoints import OLD_STATE_FILE as STATE_FILE
from gemini.train.options import Options, parse
from gemini.train.text import Corpus


def test_the_defaults_are_those_of_the_dataclass() -> None:
    assert parse([]) == Options()


def test_sizes_are_bytes_or_text() -> None:
    options = parse(["--host-memory", "24GiB", "--device-memory", "1000", "--disk-memory", "2 GB"])
    assert (options.host_memory, options.device_memory, options.disk_memory) == (24 << 30, 1000, 2 * 10**9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "argument --layers: must be a whole number of 1 or more, got '0'"),
        (["--steps", "ten"], "argument --steps: must be a whole number"),
        (["--lr", "-1"], "argument --lr: must be a finite number above 0 and below 10, got '-1'"),
        (["--host-memory", "24 GiX"], "argument --host-memory: must be a number of bytes"),
        (["--disk-memory", "0"], "more than 0, got '0'"),
        (["--precision", "fp8"], "argument --precision: invalid choice"),
        (["--hidden", "100", "--heads", "7"], "hidden must be a multiple of heads"),
        (["--text", "/no/such/file"], "no such file"),
        (["--offload-dir", "/proc/self/status"], "which is a file"),
        (["--checkpoint", str(Path(__file__).parent)], "holds other files"),
        (["--resume", "/no/such/folder"], "is no checkpoint of this job"),
        (["--laye", "3"], "unrecognized arguments"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line_that_names_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def saved(folder: Path, **options: object) -> Path:
    content = {"version": 1, "step": 3, "losses": [], "options": {**Options().as_json(), **options}}
    (folder / STATE_FILE).write_text(json.dumps(content))
    return folder


def test_resuming_takes_what_is_not_said_from_the_checkpoint(tmp_path: Path) -> None:
    folder = str(saved(tmp_path, layers=3, steps=7, seed=5, host_memory=1))
    options = parse(["--resume", folder, "--seed", "6"])
    assert (options.layers, options.steps, options.seed) == (3, 7, 6)
    assert options.host_memory is None  # where the memory is says the machine, not the checkpoint
    assert options.checkpoint_folder == tmp_path


def test_resuming_with_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--resume", str(saved(tmp_path, hidden=96)), "--hidden", "48"])
    assert "--hidden 48 does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2, "options": {}}', '{"version": 1, "options": {}}'])
def test_a_damaged_state_file_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(SystemExit):
        parse(["--resume", str(tmp_path)])
    assert f"{STATE_FILE} is damaged or from another version" in capsys.readouterr().err


def test_batches_depend_on_seed_and_step_alone() -> None:
    corpus = Corpus(bytes(range(256)) * 4, "a text")
    inputs, targets = corpus.batch(7, 3, batch_size=4, seq_len=16)
    torch.manual_seed(99)
    again, _ = corpus.batch(7, 3, batch_size=4, seq_len=16)
    assert torch.equal(inputs, again)
    assert torch.equal((inputs + 1) % 256, targets)
    assert inputs.shape == (4, 16) and inputs.is_contiguous() and targets.is_contiguous()
    for other in (corpus.batch(8, 3, 4, 16), corpus.batch(7, 4, 4, 16)):
        assert not torch.equal(inputs, other[0])


def test_the_last_byte_is_reached_and_nothing_beyond() -> None:
    corpus = Corpus(b"abcde", "a text")
    targets = torch.cat([corpus.batch(0, step, 8, 4)[1] for step in range(4)])
    assert set(targets[:, -1].tolist()) == {ord("e")}
    corpus.check(4)
    with pytest.raises(ValueError, match="has 5 bytes; sequences of 5 need at least 6"):
        corpus.check(5)


def test_the_default_text_ships_with_python_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    assert len(Corpus.load(None)) > 400_000
    file = tmp_path / "own.txt"
    file.write_bytes(b"\xff\x00 text")
    assert len(Corpus.load(file)) == 7
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        Corpus.load(file)
