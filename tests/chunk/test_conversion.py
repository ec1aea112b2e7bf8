"""Masters arrive in memory of the full copy that is not filled yet, and every element arrives once."""

from hypothesis import given
from hypothesis import strategies as st

from gemini.chunk.conversion import PIECE_NUMEL, SCRATCH_NUMEL, conversion_pieces


@given(numel=st.integers(0, 5000), ratio=st.integers(1, 4), longest=st.integers(1, 700), scratch=st.integers(1, 50))
def test_pieces_cover_a_full_copy_and_arrive_where_nothing_is_filled_yet(
    numel: int, ratio: int, longest: int, scratch: int
) -> None:
    filled = 0
    for piece in conversion_pieces(numel, ratio, longest, scratch):
        assert piece.start == filled < piece.stop <= numel
        length = piece.stop - piece.start
        if piece.room is None:
            assert length <= scratch
        else:
            assert length <= longest and piece.stop <= piece.room and piece.room + ratio * length <= numel
            assert piece.room % ratio == 0
        filled = piece.stop
    assert filled == numel


def test_a_large_full_copy_takes_few_pieces() -> None:
    pieces = list(conversion_pieces(64 << 20, 2))
    assert len(pieces) < (64 << 20) // PIECE_NUMEL + 25
    assert sum(piece.room is None for piece in pieces) <= 3
    assert SCRATCH_NUMEL * 4 == 16384
