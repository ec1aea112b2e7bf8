"""The words of the memory hierarchy: where bytes may live, and what the bytes of a chunk are for."""

from enum import Enum


class Tier(Enum):
    """A kind of memory, fastest first."""

    DEVICE = "device"
    """What computes: a CUDA device, or RAM on a box without one."""

    HOST = "host"
    """RAM."""

    DISK = "disk"
    """A folder."""


class Role(Enum):
    """What one buffer of a chunk holds. All buffers of a chunk share its layout."""

    MASTER = "master"
    """The parameters' truth: fp32 for trainable chunks, the stored dtype for frozen ones. Beside a MASTER_LOW it is
    what the compute dtype has room for, and the full copy."""

    MASTER_LOW = "master_low"
    """The rest of it. See [Note: Split master]."""

    STATE_0 = "state_0"
    """The first state of the optimizer. What it is, and of which dtype, the plan of the chunk says (`StateSlot`)."""

    STATE_1 = "state_1"
    STATE_2 = "state_2"
    STATE_3 = "state_3"
    STATE_4 = "state_4"
    STATE_5 = "state_5"

    GRADIENT = "gradient"
    """The accumulated gradient, compute dtype; alive from backward to the update."""

    SHADOW = "shadow"
    """The master in the compute dtype, in RAM: fetches read it instead of the master. Derived, so it is optional."""


STATE_ROLES = (Role.STATE_0, Role.STATE_1, Role.STATE_2, Role.STATE_3, Role.STATE_4, Role.STATE_5)
"""The optimizer's states, in the optimizer's order. A chunk has the first few of them, or none."""
