"""What one role's home has for one parameter of a chunk, wherever the home is."""

from math import prod

import torch
from torch import Tensor

from .chunk import Chunk
from .tier import Role


def read_slot(chunk: Chunk, position: int, role: Role) -> Tensor:
    """A copy, on CPU, of what a role's home has for the parameter at this position."""
    home, (offset, shape, stride) = chunk.homes[role], chunk.place(position, role)
    flat = torch.empty(prod(shape), dtype=home.dtype)
    home.read(offset, flat)
    return flat.as_strided(shape, stride)


def write_slot(chunk: Chunk, position: int, role: Role, value: Tensor) -> None:
    """Put ``value`` (any dtype, the shape of `read`, or one for all) into a home; a master also into its shadow."""
    home, (offset, shape, stride) = chunk.homes[role], chunk.place(position, role)
    if role is Role.MASTER and Role.SHADOW in chunk.homes:
        write_slot(chunk, position, Role.SHADOW, value.to(home.dtype))  # rounded once, as the update does it
    with torch.no_grad():
        if home.tensor is not None:
            home.tensor.as_strided(shape, stride, home.tensor.storage_offset() + offset).copy_(value)
            return
        value = value.detach().to("cpu", home.dtype)
        if (value.shape, value.stride()) != (shape, stride):
            value = torch.empty(prod(shape), dtype=home.dtype).as_strided(shape, stride).copy_(value)
        home.write(offset, value.as_strided((prod(shape),), (1,)))
