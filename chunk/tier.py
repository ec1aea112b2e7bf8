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
    """The parameters' truth: fp32 for trainable chunks, the stored dtype for frozen ones."""

    EXP_AVG = "exp_avg"
    """First moment, fp32."""

    EXP_AVG_SQ = "exp_avg_sq"
    """Second moment, fp32."""

    GRADIENT = "gradient"
    """The accumulated gradient, compute dtype; alive from backward to the update."""

    SHADOW = "shadow"
    """The master in the compute dtype, in RAM: fetches read it instead of the master. Derived, so it is optional."""


STATE_ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)
"""What survives a step, and what a checkpoint of a trainable chunk holds."""
