"""The parameters of one chunk: where their data point, of which class they are, and what was changed in them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from gemini.torch_private import version_of, without_torch_function

from .away import QUIET, Keeper, away_class, copied_class, is_linked, link, plain_class, unlink, was_reached

_set_data: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]
"""Sets ``data`` past the property of a `CopiedParameter`, at each fetch."""


_parameter_of: Callable[["Binding"], Tensor] = attrgetter("parameter")


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter and the two things its data and its class may be."""

    parameter: Tensor
    view: Tensor
    """Its slot in the full copy."""
    nan: Tensor
    """A NaN scalar expanded to the same shape: no memory, and a use without the chunk cannot go unnoticed."""
    pinned: type
    """The parameter's own class, or `copied_class` of it."""
    away: type
    """While nothing has the chunk pinned: see [Note: Away]. Without a keeper a parameter stays what it is pinned."""


class Bindings:
    """The bindings of a chunk's parameters, by position."""

    def __init__(self, is_hidden: bool, are_copies: bool) -> None:
        self.is_hidden = is_hidden
        """The parameters point at NaN, or did when an interrupt kept some of them from pointing at the full copy."""
        self._are_copies = are_copies
        """What pinned parameters show is another memory than home."""
        self._is_entrusted = False
        self._are_away = False
        """Their class tells the keeper what is done to them."""
        self._looked_at: list[int] | None = None
        """The versions of parameters that are away when ``data`` was ours in all of them; None: look at it again."""
        self._all: list[Binding] = []
        self._coming: list[Binding] = []
        """Of parameters that are to follow."""
        self._versions: list[int] = []
        """Per binding, torch's count of in-place operations when home and full copy were last the same."""

    def __getitem__(self, position: int) -> Binding:
        return self._all[position]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Binding]:
        return iter(self._all)

    def add(self, parameter: Tensor, view: Tensor, is_pinned: bool) -> None:
        """Make ``parameter``, whose position is the next one, follow its slot in the full copy from now on."""
        self._follow(self._prepared(parameter, view), is_pinned)

    def prepare(self, parameters: Iterable[Tensor], views: Iterable[Tensor]) -> None:
        """Ask for all memory that `follow` needs. The parameters stay where they are."""
        self._coming = [self._prepared(*each) for each in zip(parameters, views, strict=True)]

    def follow(self, is_pinned: bool) -> None:
        """Make the parameters that were prepared follow their slots from now on, which asks for no memory."""
        coming, self._coming = self._coming, []
        for binding in coming:
            self._follow(binding, is_pinned)

    def _prepared(self, parameter: Tensor, view: Tensor) -> Binding:
        nan = torch.full((), float("nan"), dtype=view.dtype, device=view.device)
        plain = plain_class(type(parameter))
        pinned = copied_class(plain) if self._are_copies else plain
        away = away_class(plain) if is_linked(parameter) else pinned
        return Binding(parameter, view, nan.expand(view.shape), pinned, away)

    def _follow(self, binding: Binding, is_pinned: bool) -> None:
        self._all.append(binding)
        with QUIET():
            self._versions.append(version_of(binding.parameter))
            binding.parameter.data = binding.nan if self.is_hidden else binding.view
        binding.parameter.__class__ = binding.pinned if is_pinned else binding.away

    def entrust(self, keeper: Keeper, last_value: Callable[[int], Tensor], is_pinned: bool) -> None:
        """Have ``keeper`` answer for the parameters while nothing has the chunk pinned.

        ``last_value`` gives the values of the parameter at a position once the keeper is gone.
        """
        self._is_entrusted = True
        for position, binding in enumerate(self._all):
            link(binding.parameter, keeper, partial(last_value, position))
            self._all[position] = replace(binding, away=away_class(plain_class(binding.pinned)))
        self.be_pinned() if is_pinned else self.be_away()

    def release(self) -> None:
        """Let the parameters go: those that others keep know where their values are."""
        self._all.clear()

    def let_go(self, memory: Sequence[Tensor]) -> None:
        """Make the parameters plain ones that lie in this memory, and forget them."""
        for binding, data in zip(self._all, memory, strict=True):
            unlink(binding.parameter)
            binding.parameter.__class__ = plain_class(binding.pinned)
            _set_data(binding.parameter, data)
        self._all.clear()

    # -- classes

    def be_pinned(self) -> None:
        """The chunk is pinned: torch uses the parameters without asking their keeper."""
        self._looked_at, self._are_away = None, False
        for binding in self._all:
            binding.parameter.__class__ = binding.pinned

    def be_away(self) -> None:
        """Nothing has the chunk pinned any more."""
        for binding in self._all:
            binding.parameter.__class__ = binding.away
        self._are_away = self._is_entrusted

    # -- data

    def hide(self) -> None:
        """Point the parameters at NaN: the full copy is gone, or an update is changing it."""
        if not self.is_hidden:
            self.is_hidden = True  # first: after an interrupt `expose` has to point all of them
            with QUIET():
                for binding in self._all:
                    binding.parameter.data = binding.nan

    def expose(self) -> None:
        """Point the parameters at the full copy."""
        if self.is_hidden:
            with QUIET():
                for binding in self._all:
                    _set_data(binding.parameter, binding.view)
            self.is_hidden = False

    def point(self, position: int, memory: Tensor) -> None:
        """Have the parameter at this position lie in other memory for a moment; `point_back` ends that."""
        with QUIET():
            self._all[position].parameter.data = memory

    def point_back(self, position: int) -> None:
        """End what `point` began."""
        binding = self._all[position]
        self.point(position, binding.nan if self.is_hidden else binding.view)

    def take_assigned(self) -> list[tuple[int, Tensor]]:
        """Positions and values of parameters whose ``data`` the user has set to another tensor.

        They point again where the chunk has them point; bringing the values there is the caller's. What is assigned
        while parameters are away goes to their keeper, so they are looked at once after they were pinned. Torch does
        not ask their class about ``set_``, which raises the version.
        """
        versions = self._versions_now()
        if versions == self._looked_at:
            return []
        found = []
        with without_torch_function():  # the class while it is away and the observer: this is no use
            for position, binding in enumerate(self._all):
                ours, former = (binding.nan, binding.view) if self.is_hidden else (binding.view, binding.nan)
                if not binding.parameter.is_set_to(ours):
                    if not binding.parameter.is_set_to(former):  # else an interrupt came between
                        found.append((position, binding.parameter.data))
                    binding.parameter.data = ours
        self._looked_at = versions if self._are_away else None
        return found

    # -- changes in place

    def edited(self) -> list[int]:
        """Positions whose parameters may have been changed in place since they were accepted.

        Those whose ``data`` was asked for in a forward are named once: memory that is kept from there and written to
        after the chunk has gone home is nobody's.
        """
        versions = self._versions_now()
        reached = [i for i, binding in enumerate(self._all) if self._are_copies and was_reached(binding.parameter)]
        if versions == self._versions:
            return reached
        return [i for i, (new, old) in enumerate(zip(versions, self._versions, strict=True)) if new != old] + reached

    @property
    def is_edited(self) -> bool:
        """True if a parameter was changed in place since it was accepted."""
        return self._versions_now() != self._versions

    def is_ahead_of_accepted(self, position: int) -> bool:
        """True if the parameter at this position was changed in place since it was accepted. For any thread."""
        with QUIET():
            return version_of(self._all[position].parameter) > self._versions[position]

    def accept(self, position: int) -> None:
        """Mark home and parameter as equal."""
        with QUIET():
            self._versions[position] = version_of(self._all[position].parameter)

    def bump_versions(self, positions: Iterable[int]) -> None:
        """Say that an update gives these parameters other values: autograd then refuses graphs that need the old ones.

        As after any in-place operation, and as after ``torch.optim``'s steps: of those graphs, the nodes that have
        saved the parameter raise, the others run.
        """
        positions, before = list(positions), self._versions_now()
        for position in positions:
            self._versions[position] = before[position] + 1  # first: for another thread this is no edit at any moment
        with QUIET():
            torch.autograd.graph.increment_version([self._all[position].parameter for position in positions])
        after = self._versions_now()
        for position in positions:
            self._versions[position] = after[position]
        if self._looked_at == before:  # and nobody has touched ``data``
            self._looked_at = after

    def _versions_now(self) -> list[int]:
        with QUIET():
            return list(map(version_of, map(_parameter_of, self._all)))
