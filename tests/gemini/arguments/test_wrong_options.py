"""A wrong option of a command ends it with exit code 2 and one line that names the option and what came."""

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from gemini.stat.cli import main as stat
from gemini.stat.commands import MODULES
from gemini.train.options import _parser, parse

WHOLES = ("", "x", "-1", "1.5", "nan", "1e3", "1_000", " 5", "٣", "9" * 5000, str(2**80))
COUNTS = (*WHOLES, "0")
NUMBERS = ("", "x", "-1", "nan", "inf", "1_0", "1e400")
SIZES = ("", "x", "0", "-1", "1.5e9", "1 GiX", "99999999TiB", "nan", "9" * 5000)
NAMES = ("", "a\0b", "x" * 5000)
WORDS = ("", "x", "AUTO")
FOLDERS = (*NAMES, "file", "file/x", "loop")

TRAIN: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("--layers", "--hidden", "--heads", "--seq-len", "--batch-size", "--steps"), COUNTS),
    **dict.fromkeys(("--save-every", "--keep"), COUNTS),
    **dict.fromkeys(("--seed", "--sample-length"), WHOLES),
    "--lr": (*NUMBERS, "0", "10"),
    **dict.fromkeys(("--device-memory", "--host-memory", "--disk-memory"), SIZES),
    **dict.fromkeys(("--precision", "--placement-policy"), WORDS),
    "--text": (*FOLDERS[:3], "loop", ".", "gone"),
    "--offload-dir": FOLDERS,
    "--checkpoint": FOLDERS,
    "--resume": (*FOLDERS, "gone"),
    "--json": (),
}
_ALL: Mapping[str, Sequence[str]] = {
    "--rank": ("", "x", "-1", "1.5", "٣"),
    "--color": WORDS,
    **dict.fromkeys(("--json", "--ascii", "--verbose", "--version", "--help"), ()),
}
STAT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "show": {"--interval": (*NUMBERS, "0", "1e9"), "--once": ()},
    "top": {"--interval": (*NUMBERS, "0", "1e9"), "--once": (), "--only": ("x", "")},
    "ls": {},
    "dmon": {"--interval": (*NUMBERS, "0", "1e9"), "--count": COUNTS, "--select": ("xyz", "ä")},
    "chunks": {**dict.fromkeys(("--tier", "--state", "--sort"), WORDS), "--group": (), "--param": ()},
    "timeline": {"--step": ("", "x", "-1", "1.5", "9" * 5000), "--csv": ()},
    "lease": {**dict.fromkeys(("--host", "--device", "--disk"), SIZES), "--timeout": NUMBERS},
    "wait": {"--state": WORDS, "--step": WHOLES, "--timeout": NUMBERS},
    "check": {
        "--max-peak": ("", "x", "host", "host=", "ram=1GiB", "host=x", "host=0"),
        **dict.fromkeys(("--max-non-model", "--max-rss"), SIZES),
        **dict.fromkeys(("--max-risk", "--max-stall-ratio", "--max-step-seconds", "--tolerance"), NUMBERS),
        "--min-hit-ratio": (*NUMBERS, "1.5"),
        "--min-steps": WHOLES,
        "--against-estimate": NAMES,
    },
    "verify": {"--quiet": ()},
    "doctor": {},
    "schema": {},
    "export": {"--format": WORDS, "--output": NAMES, "--textfile": FOLDERS},
    "serve": {"--host": (), "--port": (*WHOLES, "65536"), "--token": (), "--all-users": (), "--open": ()},
    "report": {"--output": NAMES},
    "estimate": {
        **dict.fromkeys(("--batch-size", "--seq-len", "--ranks", "--per-node"), COUNTS),
        **dict.fromkeys(("--activation-policy", "--precision", "--quantize", "--solve"), WORDS),
        **dict.fromkeys(("--gpu", "--ram", "--disk"), SIZES),
        **dict.fromkeys(("--optimizer", "--set"), ("", "x", "=1")),
        **dict.fromkeys(("--split-master", "--checkpointing"), ()),
        "--offload-dir": FOLDERS[:3],
    },
    "explain-oom": {"--model": (), "--set": ("", "x", "=1"), "--checkpointing": ()},
    "bench": {"--numel": (*COUNTS, "4095"), "--disk-size": SIZES, "--output": NAMES},
}
NEEDS_A_RUN = {("top", "--only"), ("timeline", "--step"), ("check", "--max-peak")}
"""Looked at when the run is known: see test_stat_commands.py."""
TARGETS = {"estimate": ["gpt2"], "schema": []}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("GEMINI_MEMORY_RUN_DIR", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def said(command: Callable[[list[str]], object], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2."""
    try:
        code = command(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (arguments, code, out, err)
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("option", TRAIN)
def test_a_wrong_option_of_the_job_is_named(option: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    for value in TRAIN[option]:
        line = said(parse, [f"{option}={value}"], capsys)
        assert option in line and any(text[:20] in line for text in (value, repr(value)[1:], ascii(value)[1:-1])), line
        assert len(line) < 500
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(("name", "option"), [(n, o) for n, options in STAT.items() for o in options])
def test_a_wrong_option_of_gemini_stat_is_named(
    name: str, option: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [] if name == "show" else [name]
    if (name, option) in NEEDS_A_RUN:
        return
    for value in STAT[name][option]:
        line = said(stat, [*command, *TARGETS.get(name, ["run"]), f"{option}={value}"], capsys)
        assert option in line and any(text[:20] in line for text in (value, repr(value)[1:], ascii(value)[1:-1])), line
        assert len(line) < 500


@pytest.mark.parametrize("option", _ALL)
def test_an_option_of_all_commands_is_named(option: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in _ALL[option]:
        assert option in said(stat, ["ls", f"{option}={value}"], capsys)


def test_every_option_has_wrong_values() -> None:
    assert _options(_parser()) - {"--help"} == set(TRAIN)
    assert set(STAT) == set(MODULES)
    for name, options in STAT.items():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(MODULES[name]).add_arguments(parser)
        assert _options(parser) == set(options), name


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {text for action in parser._actions for text in action.option_strings if text.startswith("--")}
