"""The examples run as their README says, and learn something."""

import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Small enough for seconds, long enough to learn.
GPT = ("gpt_gemini", "--train_step", "12", "--batch_size", "4", "--seq_len", "64")
BERT = ("bert_finetune", "--num_epochs", "3", "--hidden_size", "64", "--learning_rate", "0.002")
LLAMA = ("llama_pretrain", "--num_steps", "8", "--batch_size", "2", "--max_length", "64")
LLAMA_FP32 = (*LLAMA, "--precision", "fp32")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "reference_text")
EXPECTED = sorted(path.stem for path in (EXAMPLES / "expected").glob("*.txt"))
ARGUMENTS = {"several_ranks": ("--accumulate", "2")}
"""With which the expected output was written, where there are any."""
OF_TRL = [] if importlib.util.find_spec("trl") else ["trl_dpo"]
"""Cannot be imported where TRL is not installed, which no extra of ours does; tests/gemini/integrations/test_trl.py."""
AT_HAND = ("plain_module", "several_ranks")
NUMBER = r"\d+\.\d+"
LEAST_FALL = {GPT: 0.5, BERT: 0.1, LLAMA: 0.5}

in_its_own_process = pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def run(capfd: pytest.CaptureFixture[str], script: str, *arguments: object) -> str:
    """Run a script as ``python examples/script.py`` does, but here. Returns all that it wrote."""
    before = sys.argv, list(sys.path)
    sys.argv, sys.path = [script, *map(str, arguments)], [str(EXAMPLES), *sys.path]
    try:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    return "".join(capfd.readouterr())


def written_by(capsys: pytest.CaptureFixture[str], script: str) -> str:
    """What the script writes to stdout with the arguments of its expected output."""
    before = sys.argv, list(sys.path)
    sys.argv, sys.path = [script, *ARGUMENTS.get(script, ())], [str(EXAMPLES), *sys.path]
    try:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    return capsys.readouterr().out


def losses(written: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^(?!test).*loss: (\d+\.\d+)", written, re.MULTILINE)]


def check_it_learns(example: tuple[str, ...], written: str) -> None:
    found = losses(written)
    assert len(found) == int(example[2]), written
    assert found[-1] < found[0] - LEAST_FALL[example], written


@in_its_own_process
@pytest.mark.parametrize("example", LEAST_FALL, ids=lambda example: example[0])
def test_an_example_runs_and_its_loss_falls(example: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    check_it_learns(example, run(capfd, *example))


@in_its_own_process
@pytest.mark.parametrize("script", [each for each in SCRIPTS if each not in OF_TRL])
def test_an_example_says_how_it_is_called(
    script: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    names = runpy.run_path(str(EXAMPLES / f"{script}.py"))
    purpose, _, calls = names["__doc__"].partition("\n\n")
    with pytest.raises(SystemExit) as ended:
        names["parse"](["--help"])
    assert ended.value.code == 0
    assert purpose in " ".join(capfd.readouterr().out.split())
    commands = [line.partition(f"examples/{script}.py")[2] for line in calls.splitlines() if line]
    assert len(commands) >= 2
    for command in commands:
        names["parse"](command.split())


@in_its_own_process
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls transformers so
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # Lightning calls torch so
@pytest.mark.parametrize(
    "script", [each if each in AT_HAND else pytest.param(each, marks=pytest.mark.heavy) for each in EXPECTED]
)
def test_an_example_writes_what_it_is_expected_to(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    written, expected = written_by(capsys, script), (EXAMPLES / "expected" / f"{script}.txt").read_text()
    assert re.sub(NUMBER, "#", written) == re.sub(NUMBER, "#", expected)
    # Other processors add in another order, and steps multiply that.
    numbers = [[float(each) for each in re.findall(NUMBER, text)] for text in (written, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


@pytest.mark.heavy
@in_its_own_process
def test_two_ranks_write_what_one_writes_that_accumulates() -> None:
    (written,) = torchrun([("several_ranks",)])
    losses = [line for line in written.splitlines() if line.startswith("step ")]
    assert losses == (EXAMPLES / "expected" / "several_ranks.txt").read_text().splitlines()


@in_its_own_process
def test_every_example_is_expected_to_write_something_or_to_learn() -> None:
    assert sorted({*EXPECTED, *(example[0] for example in LEAST_FALL), "trl_dpo"}) == SCRIPTS
    readme = (EXAMPLES / "README.md").read_text()
    assert [script for script in SCRIPTS if f"]({script}.py)" not in readme] == []


@in_its_own_process
def test_bert_classifies_sentences_that_it_was_not_trained_on(capfd: pytest.CaptureFixture[str]) -> None:
    (accuracy,) = re.findall(r"^test .*accuracy: (\d\.\d+)", run(capfd, *BERT), re.MULTILINE)
    assert float(accuracy) > 0.7
    with pytest.raises(SystemExit, match=r"below the target 1\.1"):
        run(capfd, *BERT, "--num_epochs", "1", "--target_f1", "1.1")


@in_its_own_process
def test_llama_goes_on_from_a_checkpoint_as_if_it_had_not_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    straight = losses(run(capfd, *LLAMA))
    first = losses(run(capfd, *LLAMA, "--num_steps", "5", "--save_dir", tmp_path / "checkpoint"))
    then = run(capfd, *LLAMA, "--load", tmp_path / "checkpoint")
    assert "Going on from step 5" in then
    assert first + losses(then) == straight


@in_its_own_process
def test_where_llama_keeps_its_model_makes_no_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = run(capfd, *LLAMA)
    static = run(capfd, *LLAMA, "--plugin", "gemini", "--offload_optim_frac", "1.0", "--offload_param_frac", "1.0")
    on_disk = run(capfd, *LLAMA, "--host_memory", "3MiB", "--offload_dir", tmp_path)
    assert losses(static) == losses(written) == losses(on_disk)
    disk_peaks = [float(re.findall(r"disk (\d+\.\d) MiB", each)[0]) for each in (written, on_disk)]
    assert disk_peaks[0] == 0 < disk_peaks[1]


@pytest.fixture
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> "TwoRanks":
    return _two_ranks(tmp_path_factory.getbasetemp() / "checkpoint of two ranks")


@cache  # not a fixture of the module: in a process of their own, tests are set up one by one
def _two_ranks(checkpoint: Path) -> "TwoRanks":
    return TwoRanks(checkpoint)


class TwoRanks:
    """What two ranks write that torchrun starts, for all tests at once."""

    def __init__(self, checkpoint: Path) -> None:
        saved = (*LLAMA_FP32, "--num_steps", "5", "--save_dir", str(checkpoint))
        runs = (*LEAST_FALL, LLAMA_FP32, saved)
        self.checkpoint = checkpoint
        self.written = dict(zip(runs, torchrun(runs), strict=True))


def torchrun(runs: Sequence[tuple[str, ...]]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            *(str(Path(__file__).with_name("child_examples.py")), json.dumps(runs)),
        ],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return re.split(r"== run \d+\n", done.stdout)[1:]


@in_its_own_process
@pytest.mark.heavy
@pytest.mark.parametrize("example", LEAST_FALL, ids=lambda example: example[0])
def test_an_example_runs_in_two_ranks_and_its_loss_falls(example: tuple[str, ...], two_ranks: TwoRanks) -> None:
    check_it_learns(example, two_ranks.written[example])


@in_its_own_process
@pytest.mark.heavy
def test_llama_in_two_ranks_is_llama_that_accumulates_and_either_goes_on_for_the_other(
    two_ranks: TwoRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    one = (*LLAMA_FP32, "--accumulation_steps", "2")
    straight = losses(run(capfd, *one))
    assert losses(two_ranks.written[LLAMA_FP32]) == straight
    then = run(capfd, *one, "--load", two_ranks.checkpoint)
    assert "Going on from step 5" in then
    assert losses(then) == straight[5:]


@in_its_own_process
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # TRL's own, about arguments of transformers that it sets
def test_the_example_of_trl_is_trl_alone(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    plain = run(capfd, "trl_dpo", "--precision", "fp32", "--plain")
    ours = run(capfd, "trl_dpo", "--precision", "fp32", "--host_memory", "2MiB")
    assert len(losses(plain)) == 8
    assert losses(ours) == losses(plain)
