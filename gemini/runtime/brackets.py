"""The modules that have hooks: each unit's own, or coarser ones that stand for several units.

The first cycles have hooks on every unit: they show which modules run around which units, what non-model data take at
each moment, and what the plan has to move. Where chunks never move there is nothing left to learn, and a module stands
for all units in it (see `units.coarse`). Chunks that move keep the finest units: a tensor that is captured within a
module (a feature of an inner layer, say) leads backward into the middle of it, where its chunks must be.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..chunk import Chunk
from ..torch_private import is_compiled
from ..units.bracket import Bracket
from ..units.coarse import coarsest
from ..units.units import Unit, Units

LARGEST_NUMEL = 1 << 21
"""Elements that one visit may bring: their updates are waited for together, two milliseconds of work."""


class Brackets:
    """Puts hooks on modules and takes them off.

    Parameters
    ----------
    units
        The units of the model, to which coarser ones are added.
    install
        Puts the hooks of a unit on its module.
    """

    def __init__(self, units: Units, install: Callable[[Unit], Bracket]) -> None:
        self._units = units
        self._install = install
        self._fine: list[Unit] = []
        self._coarse: dict[nn.Module, Unit] = {}
        """The modules that stand for several units now."""
        self._installed: dict[Unit, Bracket] = {}
        self._within: dict[Unit, frozenset[nn.Module]] = {}
        """The modules that ran around each call of a unit so far, its own among them."""
        self._unfit: set[nn.Module] = set()
        """Modules that turned out to leave some of their graph where nothing shows it."""
        for unit in units.all:
            self.add(unit)

    def add(self, unit: Unit) -> None:
        """Put the hooks of a unit on its module, for good or until a coarser one stands for it."""
        self._fine.append(unit)
        self._installed[unit] = self._install(unit)

    def unit_of(self, module: nn.Module) -> Unit:
        """The unit that a call of a module is a visit of."""
        return self._coarse.get(module) or self._units.of[module]

    def saw(self, unit: Unit, running: Iterable[nn.Module]) -> None:
        """A unit was called while these modules ran; its own is one of them."""
        modules = frozenset(running)
        self._within[unit] = self._within.get(unit, modules) & modules

    @property
    def are_coarse(self) -> bool:
        """True if some modules stand for several units."""
        return bool(self._coarse)

    def remove(self) -> None:
        """Take all hooks off for good."""
        for bracket in self._installed.values():
            bracket.remove()
        self._installed.clear()

    def refine(self) -> None:
        """Have each unit bracket its own parameters."""
        for unit in self._coarse.values():
            self._installed.pop(unit).remove()
        self._coarse.clear()
        for unit in self._fine:
            if unit not in self._installed:
                self._installed[unit] = self._install(unit)

    def coarsen(self, chunks: Sequence[Chunk], capacity_bytes: int) -> None:
        """Have the coarsest modules bracket the units whose chunks never move.

        Parameters
        ----------
        chunks, capacity_bytes
            All chunks of the model, and the room for their full copies.
        """
        leaking = [module for module, unit in self._coarse.items() if unit.leaks_graph]
        all_fit = sum(chunk.full_nbytes for chunk in chunks) <= capacity_bytes
        if leaking or not all_fit:
            self._unfit.update(leaking)
            self.refine()
        if self._coarse or not self._within:
            return
        moving = set() if all_fit else {chunk for chunk in chunks if not chunk.full_is_home}
        within, chunks_of = {}, {}
        for unit, modules in self._within.items():
            if moving.isdisjoint(unit.chunks) and (module := unit.module) is not None and not is_compiled(module):
                within[unit.index] = modules - self._unfit
                chunks_of[unit.index] = {chunk.index for chunk in unit.chunks}
        numels = {chunk.index: chunk.layout.numel for chunk in chunks}
        for module, parts in coarsest(within, chunks_of, numels, LARGEST_NUMEL).items():
            self._coarse[module] = unit = self._units.joined(module, parts)
            for part in parts:
                self._installed.pop(self._units.all[part]).remove()
            self._installed[unit] = self._install(unit)
