"""The names of a chunk's buffers that are not states of an optimizer. Pure: no torch."""

MASTER = "master"
"""The buffer of the parameters' truth, and the name of these values."""
MASTER_LOW = "master_low"
"""Beside a master that is only the upper half: the lower one. See [Note: Split master]."""
ABSMAX = "absmax"
"""Beside masters in four or eight bits: the largest magnitude of each block. See [Note: Block formats]."""
SHADOW = "shadow"
"""The master in the compute dtype, in RAM: fetches read it instead of the master. Derived, so it is optional."""
GRADIENT = "gradient"
"""The accumulated gradient, in the compute dtype; alive from backward to the update."""
RESERVED = (MASTER, MASTER_LOW, ABSMAX, SHADOW, GRADIENT)
"""Names that no state of an optimizer can have."""
