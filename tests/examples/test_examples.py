"""The examples run as their README says, and learn something."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEVERAL_RANKS = True
"""Whether models can be boosted in several ranks. The only line to change when they can."""

# Small enough for seconds, long enough to learn.
GPT = ("gpt_gemini", "--train_step", "12", "--batch_size", "4", "--seq_len", "64")
BERT = ("bert_finetune", "--num_epochs", "3", "--hidden_size", "64", "--learning_rate", "0.002")
LLAMA = ("llama_pretrain", "--num_steps", "8", "--batch_size", "2", "--max_length", "64")
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
@pytest.mark.parametrize("script", [example[0] for example in LEAST_FALL])
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


@pytest.mark.skipif(not SEVERAL_RANKS, reason="models cannot be boosted in several ranks yet")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("example", LEAST_FALL, ids=lambda example: example[0])
def test_an_example_runs_in_two_ranks_and_its_loss_falls(example: tuple[str, ...]) -> None:
    check_it_learns(example, torchrun(*example))


@pytest.mark.skipif(not SEVERAL_RANKS, reason="models cannot be boosted in several ranks yet")
@pytest.mark.timeout(240)
def test_llama_in_two_ranks_has_the_losses_of_one_that_accumulates(capfd: pytest.CaptureFixture[str]) -> None:
    one = torchrun(*LLAMA, "--precision", "fp32", "--accumulation_steps", "2", ranks=1)
    assert losses(torchrun(*LLAMA, "--precision", "fp32")) == losses(one)


def torchrun(script: str, *arguments: str, ranks: int = 2) -> str:
    """What the ranks of a script write together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            str(EXAMPLES / f"{script}.py"),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
