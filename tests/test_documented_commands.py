"""Command lines in the documents are taken by the parsers of what they call; `gemini-stat` answers them."""

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stat_runs
from documented import PAGES, ROOT, commands

from gemini.stat.cli import main as gemini_stat
from gemini.stat.console import Usage

OPTIONS_OF_SSH = ("-L", "-t")
NEED_MORE = ("bench", "doctor", "dmon", "estimate", "explain-oom", "lease", "serve", "top", "verify")
"""Commands of `gemini-stat` that take long, run on, or need a checkpoint, a model or a crash: only parsed here."""
CAN_ANSWER = (0, 3)
"""Yes, and no: "the peak is above what you allow"."""


class _Parsed(BaseException):
    """Arguments were taken; what the program would do with them is not for this test."""


def mistakes(command: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is wrong with a command line; None: nothing. ``[optional]`` is given, of ``{a,b}`` the first."""
    try:
        words = shlex.split(re.sub(r"\{(\w+)[^}]*\}", r"\1", re.sub(r"(?<=\s)\[([^]]*)\]", r"\1", command)))
    except ValueError as error:
        return str(error)
    program, *rest = words
    return _CHECKS[program if program in _CHECKS else "script"](program, rest, monkeypatch)


def _stat(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    return _parsed(lambda: gemini_stat(rest), ["gemini-stat", *rest], monkeypatch)


def _python(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    if rest[0] == "-m":
        module, *arguments = rest[1:]
        return _parsed(lambda: runpy.run_module(module, run_name="__main__"), [module, *arguments], monkeypatch)
    script, *arguments = rest
    if script == "train.py":  # the reader's
        return None
    path = ROOT / script
    if not path.exists():
        return f"{script} does not exist"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(path if path.is_dir() else path.parent))
        for name in [name for name, module in sys.modules.items() if _is_of_a_script(module)]:
            patch.delitem(sys.modules, name)  # scripts of one folder name their modules as those of another do
        return _parsed(lambda: runpy.run_path(str(path), run_name="__main__"), [script, *arguments], patch)


def _is_of_a_script(module: Any) -> bool:
    file = getattr(module, "__file__", None) or ""
    return file.startswith((str(ROOT / "scripts"), str(ROOT / "examples")))


def _parsed(call: Callable[[], object], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        original(self, *given, **named)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", argv)
        try:
            call()
        except _Parsed:
            return None
        except Usage as error:
            return str(error)
        except SystemExit as end:
            return None if end.code in (0, None) else f"exits with {end.code}"
    return "took no arguments"


def _script(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    path = ROOT / program
    if not path.is_file():
        return f"{program} does not exist"
    if not os.access(path, os.X_OK):
        return f"{program} cannot be executed"
    if subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode:
        return f"{program} is no script"
    if path.name == "oom_regression":
        return _python("python", ["scripts/oom", *rest], monkeypatch)
    if path.name == "test":
        files = [word for word in rest if word.startswith("tests/")]
        return next((f"{file} does not exist" for file in files if not (ROOT / file).exists()), None)
    return None


def _bash(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    path = ROOT / rest[0]
    return None if path.is_file() and not subprocess.run(["bash", "-n", str(path)]).returncode else f"no {rest[0]}"


def _ssh(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    while rest[0] in OPTIONS_OF_SSH:
        rest = rest[2:] if rest[0] == "-L" else rest[1:]
    return mistakes(shlex.join(rest[1:]), monkeypatch)  # after the host


def _kubectl(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    return mistakes(shlex.join(rest[rest.index("--") + 1 :]), monkeypatch)


def _srun(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    return mistakes(shlex.join(rest[rest.index("python") :]), monkeypatch) if "python" in rest else "runs no python"


def _torchrun(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    from torch.distributed.run import get_args_parser

    try:
        options = get_args_parser().parse_args(rest)
    except SystemExit:
        return "torchrun does not take that"
    return _python("python", [options.training_script, *options.training_script_args], monkeypatch)


def _pip(program: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = [extra for word in rest for extra in re.findall(r"gemini-memory\[(.*)\]", word)]
    return next((f"no extra {extra}" for extra in wanted if extra not in extras), None)


_CHECKS = {
    "bash": _bash,
    "gemini-stat": _stat,
    "kubectl": _kubectl,
    "pip": _pip,
    "python": _python,
    "script": _script,
    "srun": _srun,
    "ssh": _ssh,
    "torchrun": _torchrun,
}


@pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if any(commands(path.read_text()))])
def test_commands_are_taken(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("pytest", "transformers"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    found = list(dict.fromkeys(commands(PAGES[page].read_text())))
    wrong = {command: mistake for command in found if (mistake := mistakes(command, monkeypatch))}
    assert wrong == {}


def test_gemini_stat_answers_what_the_documents_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prom").mkdir()
    stat_runs.make_run()
    answered = []
    for command in sorted({each for path in PAGES.values() for each in commands(path.read_text())}):
        program, *rest = shlex.split(command)
        has_target = any(re.fullmatch(r"\d+|runs/telemetry|RUN|DIR", word) for word in rest)
        if program != "gemini-stat" or has_target or "-r" in rest or any(word in NEED_MORE for word in rest):
            continue
        rest = [word.replace("/var/lib/node_exporter", str(tmp_path / "prom")) for word in rest]
        code = gemini_stat(rest)
        assert code in CAN_ANSWER, (command, code, capsys.readouterr().err)
        answered.append(command)
    assert {"gemini-stat", "gemini-stat ls", "gemini-stat report", "gemini-stat chunks"} <= set(answered)


@pytest.mark.heavy
@pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
def test_gemini_stat_estimates_and_measures_as_the_how_tos_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    how_tos = [path for name, path in PAGES.items() if name == "README.md" or name.startswith("docs/howto/")]
    asked = {each for path in how_tos for each in commands(path.read_text())}
    mine = sorted(each for each in asked if re.match(r"gemini-stat (estimate gpt2|bench) ", each))
    for command in mine:
        code = gemini_stat(shlex.split(command)[1:] if "bench" not in command else ["bench", str(tmp_path)])
        assert code in CAN_ANSWER, (command, code, capsys.readouterr().err)
    assert len(mine) >= 5


@pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
def test_the_checks_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "    gemini-stat gone --never  # a\n    b\n\n```sh\nscripts/gone\n```\n\n`python -m gemini.train --nope`\n"
    found = list(commands(text))
    assert found == ["gemini-stat gone --never", "scripts/gone", "python -m gemini.train --nope"]
    for command in (*found, "torchrun --nope x.py", "pip install 'gemini-memory[gone]'", "python examples/gone.py"):
        assert mistakes(command, monkeypatch), command
