"""For all tests: nothing is written outside of the test's own folders, and no hub is asked."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from own_process import pytest_collection_modifyitems, pytest_runtest_protocol, pytest_unconfigure
from sampled import pytest_pycollect_makeitem

__all__ = [  # hooks
    "pytest_collection_modifyitems",
    "pytest_pycollect_makeitem",
    "pytest_runtest_protocol",
    "pytest_unconfigure",
]

# The same examples in every run: whether a change is accepted must not depend on luck. To look for new ones:
# HYPOTHESIS_PROFILE=explore scripts/test tests/...
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported. Its threads would else wait for work by spinning, and take the cores from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_finish() -> None:
    from seeding import seed_only_what_is_there

    seed_only_what_is_there()
    gc.collect()
    gc.freeze()  # what imports have made: each collection would look at all of it


@pytest.fixture(autouse=True)
def _own_state_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    monkeypatch.delenv("GEMINI_MEMORY_RUN_DIR", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: small tensors gain nothing from more, and on a busy machine wait for them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
