"""The seam for several owners, where there is only one."""

from manager_rig import FROZEN, TRAINABLE, Rig

from gemini.chunk import SingleProcess
from gemini.chunk.extent import Owner


def test_a_process_alone_owns_everything_and_agrees_with_itself() -> None:
    alone = SingleProcess()
    assert alone.owner == Owner(index=0, count=1) and alone.owner.extents(1000) == (range(1000),)
    assert alone.agree("a step", 7) == [7]


def test_chunks_of_one_owner_are_whole_and_ask_nobody() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    for chunk in rig.chunks:
        assert chunk.is_whole and chunk.own_full.numel() == chunk.full.numel()
        rig.use(chunk)
        assert all(place.own == range(place.numel) for place in (chunk.place(0, "master"), chunk.place(1, "master")))
    rig.manager.together.complete_gradients()
