"""The transition table of a chunk."""

import itertools

import pytest

from gemini.chunk.state import TRANSITIONS, ChunkState, transition
from gemini.errors import GeminiError, StateError

ALLOWED = {
    ("HOME", "FETCHING"),
    ("HOME", "HOME_UPDATING"),
    ("HOME", "READY_UPDATING"),
    ("HOME_UPDATING", "HOME"),
    ("HOME_UPDATING", "FETCHING"),
    ("FETCHING", "READY"),
    ("FETCHING", "HOME"),
    ("FETCHING", "HOME_UPDATING"),
    ("READY", "IN_USE"),
    ("READY", "HOME"),
    ("READY", "READY_UPDATING"),
    ("READY_UPDATING", "READY"),
    ("IN_USE", "READY"),
    ("IN_USE", "IN_USE_UPDATING"),
    ("IN_USE_UPDATING", "IN_USE"),
    ("IN_USE_UPDATING", "READY_UPDATING"),
}
PAIRS = list(itertools.product(ChunkState, ChunkState))


@pytest.mark.parametrize(("old", "new"), [p for p in PAIRS if (p[0].name, p[1].name) in ALLOWED], ids=str)
def test_a_transition_in_the_table_gives_the_new_state(old: ChunkState, new: ChunkState) -> None:
    assert transition(7, old, new) is new


@pytest.mark.parametrize(("old", "new"), [p for p in PAIRS if (p[0].name, p[1].name) not in ALLOWED], ids=str)
def test_every_other_transition_raises_and_names_chunk_and_states(old: ChunkState, new: ChunkState) -> None:
    with pytest.raises(StateError, match=f"chunk 7: {old.name} -> {new.name} is not a transition") as raised:
        transition(7, old, new)
    assert isinstance(raised.value, GeminiError) and isinstance(raised.value, RuntimeError)


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(ChunkState)
    assert set().union(*TRANSITIONS.values()) == set(ChunkState)
    assert all(TRANSITIONS.values())
