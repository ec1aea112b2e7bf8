"""An argument that makes no sense is an error that names it, before anything has happened."""

import inspect
import tempfile
import warnings
from pathlib import Path

import pytest
from entries import Entry, entries
from wrong_values import Places, shown

from gemini import Booster, Budget, GeminiPlugin, HybridAdam, LazyInitContext
from gemini.arguments.checked import Table, checked
from gemini.arguments.rules import Whole

LONGEST_MESSAGE = 450
LEAST_CASES = 1500
"""Fewer would mean that a table has been lost."""

_folder = tempfile.TemporaryDirectory()
ENTRIES = entries(Places.made(Path(_folder.name)))
CASES = [(entry, name) for entry in ENTRIES for name in entry.wrong]


@pytest.mark.parametrize(("entry", "name"), CASES, ids=[f"{entry.name}-{name}" for entry, name in CASES])
def test_a_wrong_argument_is_named(entry: Entry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = entry.named or name
    for value in entry.wrong[name]:
        with warnings.catch_warnings(), pytest.raises((ValueError, TypeError)) as raised:
            warnings.simplefilter("error")
            entry.call(**{name: value})
            pytest.fail(f"{entry.name}({name}={shown(value)}) was taken")
        text = str(raised.value)
        assert said in text and ("got " in text or repr(value) in text), f"{shown(value)}: {text}"
        assert len(text) < LONGEST_MESSAGE and "\n" not in text, text
    assert list(tmp_path.iterdir()) == []  # nothing has been made on the way


def test_there_are_enough_cases() -> None:
    assert sum(len(entry.wrong[name]) for entry, name in CASES) >= LEAST_CASES


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_every_argument_has_wrong_values_or_a_reason(entry: Entry) -> None:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(entry.function)
    names = {name for name, each in signature.parameters.items() if each.kind not in kinds}
    assert names == set(entry.wrong) | set(entry.unchecked)


def test_every_public_function_with_arguments_has_a_table() -> None:
    classes = (Booster, GeminiPlugin, HybridAdam, Budget, LazyInitContext)
    functions = {f"{cls.__name__}.__init__": cls.__init__ for cls in classes}
    functions |= {f"Booster.{name}": value for name, value in vars(Booster).items() if inspect.isfunction(value)}
    for base in Booster.__mro__[1:-1]:
        functions |= {f"Booster.{name}": value for name, value in vars(base).items() if inspect.isfunction(value)}
    without = {name for name, function in functions.items() if inspect.unwrap(function) is function}
    kinds = "Booster.boost", "Booster.execute_pipeline", "Booster.wait_until_finished"
    assert without == set(kinds)  # by their types, not at all, nothing to give


@pytest.mark.parametrize("table", [{}, {"a": Whole()}, {"a": Whole(), "b": Whole(), "c": Whole()}])
def test_a_function_whose_argument_has_no_rule_cannot_be_made(table: Table) -> None:
    def function(a: int, b: int) -> int:
        return a + b

    with pytest.raises(TypeError, match="its rules differ"):
        checked(table)(function)
    assert checked({"a": Whole(), "b": Whole()})(function)(1, b=2) == 3
