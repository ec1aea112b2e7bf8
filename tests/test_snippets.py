"""Blocks of Python in the documents run, page by page; those marked as fragments are Python and say why they do not."""

import ast
import gc
import os
import warnings
from pathlib import Path

import pytest
from documented import PAGES, Block, blocks, fences

from gemini.logging import disable_existing_loggers

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

WITH_BLOCKS = [name for name, path in PAGES.items() if any(not block.fragment for block in blocks(path.read_text()))]
DISK = "/mnt/nvme"
"""The folder that pages name; a test has its own."""


def complaints(page: str, found: list[Block], folder: Path) -> list[str]:
    """Run the blocks one after the other, in one namespace. Returns what went wrong, with line numbers of the page."""
    from snippet_stage import Stage

    stage = Stage(folder)
    wrong = []
    for block in found:
        if block.fragment:
            continue
        code = block.code.replace(DISK, str(folder))
        unknown = stage.furnish(code)
        if unknown:
            wrong.append(f"{page}:{block.line}: nobody makes {', '.join(unknown)}")
            continue
        try:
            exec(compile("\n" * block.line + code, page, "exec"), stage.names)
        except Exception as error:
            wrong.append(f"{page}:{block.line}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disable_existing_loggers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tiny models and made-up capacities bring about
        wrong = complaints(page, blocks(PAGES[page].read_text()), tmp_path)
        gc.collect()
    assert wrong == []
    assert Path(os.getcwd()) == tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_fragment_is_python(page: str) -> None:
    for block in blocks(PAGES[page].read_text()):
        ast.parse(block.code)


def test_manifests_are_yaml_and_run_what_exists() -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    found = [yaml.safe_load(each) for path in PAGES.values() for each in fences(path.read_text(), "yaml")]
    containers = [each for job in found for each in job["spec"]["template"]["spec"]["containers"]]
    assert [each["command"][0] for each in containers] == ["torchrun"]


def test_most_blocks_run() -> None:
    found = [block for path in PAGES.values() for block in blocks(path.read_text())]
    assert len([block for block in found if block.fragment]) * 3 <= len(found)


@pytest.mark.own_process(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
def test_the_checks_fire(tmp_path: Path) -> None:
    text = "```python\nx = gone\n```\n\n<!-- fragment: a reason -->\n```python\ngone()\n```\n\n```python\n1 / 0\n```\n"
    found = blocks(text)
    assert [block.fragment for block in found] == [None, "a reason", None]
    assert complaints("page.md", found, tmp_path) == [
        "page.md:1: nobody makes gone",
        "page.md:10: ZeroDivisionError: division by zero",
    ]
