"""What is to be packed and placed, as a frozen value. Pure: modules are sets of tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..chunk.layout import TensorSpec
from ..planning.placement import Capacity, ChunkNeed, PlacementPolicy

NamedSet = tuple[str, frozenset[int]]
NeedOf = Callable[[int, bool], ChunkNeed]
"""What a chunk asks for, by its number of elements, and with or without a home for its gradient: see `Group.need`."""


@dataclass(frozen=True, slots=True)
class Use:
    """What is needed at once, as far as the modules tell before anything has run. Sets of tensors, or of chunks."""

    units: Sequence[NamedSet]
    """What is in use while a unit runs, with its name."""
    siblings: Sequence[NamedSet]
    """The same, with the units beside it in its module. Those that read the same input (query, key and value) stay in
    use in backward until the last of them is done; which these are is not known yet."""
    stages: Sequence[frozenset[int]]
    """What each module uses by itself, in the order of the modules, which is mostly that of their use."""

    def of_chunks(self, chunk_of: Mapping[int, int]) -> "Use":
        """The same with tensors replaced by the chunks that they are in."""
        stages = [frozenset(chunk_of[key] for key in tensors) for tensors in self.stages]
        units, siblings = (
            [(name, frozenset(chunk_of[key] for key in tensors)) for name, tensors in sets]
            for sets in (self.units, self.siblings)
        )
        return Use(units, siblings, stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Tensors, the memory there is, and the choices that the user has made."""

    tensors: tuple[TensorSpec, ...]
    """In the order of the model; a slot's ``key`` and the members of ``use`` are indices into these."""
    needs: tuple[NeedOf, ...]
    """One for each tensor: what the chunk that it is in asks for; the same for all tensors of a group."""
    use: Use
    capacity: Capacity
    """What there is, with nothing kept free yet."""
    policy: PlacementPolicy
    chunk_numel: int | None
    search_range: tuple[int, int] | None
    search_step: int | None
    max_prefetch: int
    compute_itemsize: int
    """Bytes of an element of most full copies."""
    borrows_gradients: bool
    """Gradients have no home where there is RAM for a few of them."""
    staging_blocks: int
    """Blocks of fp32 elements on HOST that stand between DISK and everything else, if there are homes on DISK."""
    whole_staging_bytes: int = 0
    """The same for updates that take whole parameters."""

    def staging_bytes(self, block_numel: int) -> int:
        """The staging on HOST between DISK and everything else, with blocks of ``block_numel`` elements each."""
        return self.staging_blocks * block_numel * 4 + self.whole_staging_bytes
