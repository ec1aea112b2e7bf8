"""Lets the tests of this folder import its modules: pytest's importlib mode leaves ``sys.path`` alone."""

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
logging.getLogger("transformers").setLevel(logging.ERROR)

from forms import FORMS, Form, Prepared, prepared  # noqa: E402
from operations import folder_in_memory  # noqa: E402


@pytest.fixture(params=FORMS, ids=lambda form: form.name, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """Each way to save, over an older checkpoint."""
    form: Form = request.param
    with folder_in_memory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks transformers for it
        with prepared(form, folder / "x") as it:
            yield it
