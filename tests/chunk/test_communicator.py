"""The seam for several ranks, with one rank."""

import torch

from gemini.chunk import Communicator, SingleProcess


def test_one_rank_gathers_and_reduces_nothing() -> None:
    communicator: Communicator = SingleProcess()
    tensor = torch.arange(4.0)
    communicator.all_gather(tensor)
    communicator.reduce_gradient(tensor)
    assert torch.equal(tensor, torch.arange(4.0))
    assert communicator.agree_max(tensor) is tensor
    assert (communicator.rank, communicator.world_size) == (0, 1)
