"""What to build for one chunk: which buffers, of which dtype, where."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .layout import ChunkLayout
from .tier import STATE_ROLES, Role, Tier


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One value that an optimizer keeps for every element of a parameter, or for every block of them."""

    name: str
    """The optimizer's own word, such as ``exp_avg``: in its state dict, in checkpoints, in messages."""
    dtype: torch.dtype = torch.float32
    """Of the buffer, hence also its bytes per element; at most 4."""
    block_numel: int = 1
    """Elements of the parameter that share one value. A parameter begins with a block, and may end within one."""

    has_spare_sign: bool = False
    """float32, never negative, and its optimizer knows that the signs may say something else ([Note: Split master])."""

    def numel(self, numel: int) -> int:
        """Values that are kept for so many elements."""
        return -(-numel // self.block_numel)

    def zeros(self, numel: int, device: torch.device) -> torch.Tensor:
        """What is kept for so many elements before the first step (flat)."""
        return torch.zeros(self.numel(numel), dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What to build for one chunk."""

    layout: ChunkLayout
    homes: Mapping[Role, Tier]
    """The tier of each role that this chunk has; a frozen chunk has a MASTER only. MASTER_LOW goes with MASTER."""
    compute_dtype: torch.dtype
    """Of the full copy and the gradient."""
    states: tuple[StateSlot, ...] = ()
    """What the roles ``STATE_ROLES`` are here, in that order."""
    param_group: int = -1
    """Index of the optimizer's parameter group that its parameters were packed by; -1 if it is frozen."""
    borrows_gradient: bool = False
    """Its gradient has no home: it lives in borrowed memory until the update, which comes within backward."""
    full_is_home: bool = False
    """The full copy is the master's home: the same bytes in memory where units run, so that nothing is ever moved."""
    update_reaches_full: bool = True
    """The update can write through to the full copy; if not, that is evicted instead."""

    @property
    def is_split(self) -> bool:
        """True if its master is in two halves, the upper one being the full copy."""
        return Role.MASTER_LOW in self.homes

    @property
    def is_trainable(self) -> bool:
        """True if an optimizer updates it (which one with no states of its own does as well)."""
        return Role.GRADIENT in self.homes or self.borrows_gradient

    def dtype(self, role: Role) -> torch.dtype:
        """fp32 for the whole master of a trainable chunk, what its slot says for a state, else the compute dtype."""
        if role in STATE_ROLES:
            return self.states[STATE_ROLES.index(role)].dtype
        if role is Role.MASTER_LOW:
            return torch.int16
        is_whole_master = role is Role.MASTER and self.is_trainable and not self.is_split
        return torch.float32 if is_whole_master else self.compute_dtype

    def numel(self, role: Role) -> int:
        """Elements of the role's buffer: fewer than the chunk has where blocks of them share one."""
        numel = self.layout.numel
        return self.states[STATE_ROLES.index(role)].numel(numel) if role in STATE_ROLES else numel

    def nbytes(self, role: Role) -> int:
        """Bytes of the role's buffer."""
        return self.numel(role) * self.dtype(role).itemsize

    def name(self, role: Role) -> str:
        """For messages: the optimizer's word for a state, the role's own for the others."""
        return self.states[STATE_ROLES.index(role)].name if role in STATE_ROLES else role.value
