"""Fixtures of the tests that need several ranks."""

from collections.abc import Iterator

import pytest
from world import Worlds


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """``worlds(size)``: ranks that stay for the tests to come."""
    worlds = Worlds()
    yield worlds
    worlds.close()
