"""Lets the tests of this folder import its modules: pytest's importlib mode leaves ``sys.path`` alone."""

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

sys.path.insert(0, str(Path(__file__).parent))
logging.getLogger("transformers").setLevel(logging.ERROR)

from forms import FORMS, Form, Prepared, prepared  # noqa: E402


@pytest.fixture(params=FORMS, ids=lambda form: form.name, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """Each way to save, over an older checkpoint."""
    form: Form = request.param
    memory = Path("/dev/shm")  # thousands of syncs, which is what a disk is slow at
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks transformers for it
        with prepared(form, Path(folder) / "x") as it:
            yield it
