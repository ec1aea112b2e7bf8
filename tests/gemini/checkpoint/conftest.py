"""Lets the tests of this folder import its modules: pytest's importlib mode leaves ``sys.path`` alone."""

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
logging.getLogger("transformers").setLevel(logging.ERROR)

from forms import FORMS, Form, Prepared, prepared  # noqa: E402
from operations import folder_in_memory  # noqa: E402

QUICK = ("folder", "sharded over one file", "other shards", "checkpoint that replaces one", "pair", "optimizer")
"""The forms into which the default run injects faults; the others make most of these calls as well."""


def marked(form: Form) -> Any:
    return pytest.param(form, id=form.name, marks=() if form.name in QUICK else pytest.mark.heavy)


@pytest.fixture(params=map(marked, FORMS), scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """Each way to save, over an older checkpoint."""
    form: Form = request.param
    with folder_in_memory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks transformers for it
        with prepared(form, folder / "x") as it:
            yield it
