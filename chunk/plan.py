"""What to build for one chunk: which buffers, of which dtype, where."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from . import division
from .content import BufferSpec, Codec, MasterCodec, Plain
from .division import Divided, HomeTier
from .extent import EXTENT_MULTIPLE, SOLE, Owner, Place
from .layout import ChunkLayout
from .names import GRADIENT, MASTER
from .tier import Tier


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What to build for one chunk."""

    layout: ChunkLayout
    codec: MasterCodec
    """How the parameters are kept."""
    states: tuple[BufferSpec, ...]
    """What the optimizer keeps, in its own order; nothing for a frozen chunk."""
    tiers: Mapping[str, HomeTier]
    """Where each buffer lies, by its name: the codec's, the states, and the gradient if it has a home."""
    compute_dtype: torch.dtype
    """Of the full copy and the gradient."""
    param_group: int = -1
    """Index of the optimizer's parameter group that its parameters were packed by; -1 if it is frozen."""
    full_is_home: bool = False
    """The full copy is the buffer that a fetch would read: it is never moved."""
    update_reaches_full: bool = True
    """The update can write through to the full copy; if not, that is evicted instead."""
    borrows_gradient: bool = False
    """Its gradient has no home: it lives in borrowed memory until the update, which comes within backward."""
    averages: tuple[BufferSpec, ...] = ()
    """Running averages of the masters, each of which follows them in every update."""
    owner: Owner = SOLE
    """Who keeps an extent of it at home, and together with how many others."""

    # Derived once: they are looked at in each update.
    specs: Mapping[str, BufferSpec] = field(init=False, repr=False, compare=False)
    """Every buffer that has a home, by its name."""
    extents: tuple[range, ...] = field(init=False, repr=False, compare=False)
    """The elements of the layout that each owner keeps at home."""
    extent: range = field(init=False, repr=False, compare=False)
    """The elements of the layout that are kept at home here."""

    def __post_init__(self) -> None:
        gradient = (self.gradient_spec,) if GRADIENT in self.tiers else ()
        specs = {spec.name: spec for spec in (*self.codec.specs, *self.states, *self.averages, *gradient)}
        object.__setattr__(self, "specs", specs)
        object.__setattr__(self, "extents", self.owner.extents(self.layout.numel))
        object.__setattr__(self, "extent", self.extents[self.owner.index])
        if set(self.tiers) != set(self.specs):
            raise ValueError(
                f"chunk {self.layout.index} has buffers {', '.join(self.specs)} and places for {', '.join(self.tiers)}"
            )
        if self.full_is_home and isinstance(self.tiers[MASTER], Divided):
            raise ValueError(f"chunk {self.layout.index} computes with its masters, which are to be on one tier")
        for spec in (*self.codec.specs, *self.states) if self.owner.count > 1 else ():
            if EXTENT_MULTIPLE % spec.block_numel:
                raise ValueError(
                    f"{spec.name} has a value for each block of {spec.block_numel} elements, and several processes "
                    f"keep extents that begin at multiples of {EXTENT_MULTIPLE}"
                )

    @property
    def gradient_spec(self) -> BufferSpec:
        return BufferSpec(GRADIENT, self.compute_dtype)

    @property
    def codecs(self) -> dict[str, Codec]:
        """How the masters, each state and each average are kept, by the name of these values."""
        states = {spec.name: self.codec.of_state(spec) for spec in self.states}
        return {MASTER: self.codec, **states, **{spec.name: Plain(spec) for spec in self.averages}}

    @property
    def is_trainable(self) -> bool:
        """True if an optimizer updates it (which one with no states of its own does as well)."""
        return GRADIENT in self.tiers or self.borrows_gradient

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The elements of the extent (counted from its first one) where a buffer goes from one tier to another."""
        found = set()
        for name, where in self.tiers.items():
            if isinstance(where, Divided) and where.host_bytes < self.nbytes(name):
                spec = self.specs[name]
                found.add(where.host_bytes // spec.dtype.itemsize * spec.block_numel)
        return tuple(sorted(found))

    def place(self, position: int, block_numel: int = 1) -> Place:
        """Where the values of a parameter are, of which there may be one for each block of elements."""
        return Place.of(self.layout.slots[position], block_numel, self.extents, self.owner.index)

    def keeps_masters_of(self, before: "ChunkPlan") -> bool:
        """True if the masters can stay in the homes that another plan gave them."""
        is_same = (self.codec, self.extent) == (before.codec, before.extent) and not self.codec.computes
        is_apart = not self.full_is_home and not before.full_is_home
        return is_same and is_apart and all(self.tiers[s.name] == before.tiers[s.name] for s in self.codec.specs)

    def part(self, name: str, start: int, stop: int) -> slice:
        """Where the buffer of this name has elements ``[start, stop)`` of the layout, which are at home here."""
        first = self.extent.start
        return self.specs[name].part(start - first, stop - first) if name in self.specs else slice(start, stop)

    def nbytes(self, name: str) -> int:
        """Bytes of a buffer."""
        return self.specs[name].nbytes(len(self.extent))

    def parts(self, name: str) -> tuple[tuple[Tier, int], ...]:
        """The parts of a buffer, in order: the tier and the bytes of each."""
        return division.parts(self.tiers[name], self.nbytes(name))

    def nbytes_on(self, tier: Tier, names: Iterable[str] | None = None) -> int:
        """Bytes on a tier of the buffers with these names, or of all."""
        of = self.tiers if names is None else names
        return sum(nbytes for name in of for at, nbytes in self.parts(name) if at is tier)
