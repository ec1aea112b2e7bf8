"""Units: the modules whose forward brackets the uses of their parameters."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from weakref import ReferenceType, ref

from torch import Tensor, nn

from ..chunk import Chunk, ChunkManager
from ..torch_private import is_compiled
from .results import Mark, Results


@dataclass(slots=True, eq=False)
class Unit:
    """A module and the chunks that must be on DEVICE while it runs."""

    index: int
    name: str
    module_ref: ReferenceType[nn.Module] | None
    """Weak: autograd nodes hold visits, and the garbage collector does not see through them."""
    chunks: tuple[Chunk, ...]
    without_gradients: tuple[Chunk, ...] = ()
    """Further chunks that must be there in a call without gradients."""
    is_joined: bool = False
    """It stands for several units, which take its place again when there is no room for all of them at once."""
    graph_attributes: tuple[str, ...] = ()
    """Attributes in which it leaves tensors with a graph (auxiliary losses): outputs of another kind."""
    leaks_graph: bool | None = None
    """It leaves such tensors also where only a look at all results finds them; None before the first look."""
    graph_is_contained: bool = False
    """When it was last watched, all of its graph could be reached from its results."""

    def needs(self, chunks: Iterable[Chunk]) -> None:
        """Bring these chunks, too, from now on."""
        found = {chunk.index: chunk for chunk in (*self.chunks, *chunks)}
        self.chunks = tuple(found[index] for index in sorted(found))

    def leaves_graphs_in(self, attributes: Iterable[str]) -> None:
        """Look into these attributes from now on, as into its outputs."""
        self.graph_attributes = tuple(attributes)

    def was_watched(self, leaks: bool) -> None:
        """One call was watched, and leaked some of its graph or not."""
        self.leaks_graph = bool(self.leaks_graph or leaks)

    def contains_graph(self, is_contained: bool) -> None:
        """Whether all of its graph can be reached from its results."""
        self.graph_is_contained = is_contained

    @property
    def module(self) -> nn.Module | None:
        """The module, while it lives; None for code outside of any."""
        return None if self.module_ref is None else self.module_ref()


@dataclass(slots=True, eq=False)
class Visit:
    """One call of a unit; backward sees the same object again."""

    unit: Unit
    extra: tuple[Chunk, ...] = ()
    """Further chunks, which this call alone turned out to need."""
    input_nodes: Collection[object] = ()
    """The autograd nodes of the inputs at entry, to tell what the unit made from what it passed on."""
    begin: Mark | None = None
    """When its forward began; None if that is not known."""
    results: Results | None = None
    """The results of its operations, if they are watched for this visit alone."""

    def needs(self, chunks: Iterable[Chunk]) -> None:
        """This call turned out to need these chunks besides."""
        self.extra = (*self.extra, *chunks)

    def begins(self, mark: Mark, input_nodes: Collection[object] = (), results: Results | None = None) -> None:
        """Its forward makes a graph, from here on."""
        self.begin, self.input_nodes, self.results = mark, input_nodes, results

    def ends(self) -> None:
        """Its forward is over: forget what led to its inputs."""
        self.input_nodes, self.results = (), None

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Chunks that must be on DEVICE while it is open."""
        return (*self.unit.chunks, *self.extra) if self.extra else self.unit.chunks


class Units:
    """The units of a model, growing when a parameter is seen in use outside of its own.

    The model itself is always one. A compiled module is one with all that is below it: nothing of ours may be in what
    is compiled.
    """

    def __init__(self, model: nn.Module, manager: ChunkManager) -> None:
        self._manager = manager
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self.all: list[Unit] = []
        self.of: dict[nn.Module, Unit] = {}
        self._joined: dict[nn.Module, Unit] = {}
        for module in bracketed_modules(model):
            chunks = self.chunks_of(own_parameters(module))
            besides = self.chunks_of(parameters_of_fast_path(module))
            if chunks or besides or module is model:
                self._add(module, chunks, tuple(c for c in besides if c not in chunks))

    def chunks_of(self, parameters: Iterable[Tensor]) -> tuple[Chunk, ...]:
        """The chunks that hold these parameters, in chunk order; unmanaged ones are left out."""
        places = map(self._manager.find, parameters)
        return _in_order(place[0] for place in places if place is not None)

    def extend(self, module: nn.Module, parameter: Tensor) -> tuple[Unit, bool]:
        """Make ``module`` bracket ``parameter`` too; True if it was no unit before."""
        unit = self.of.get(module)
        is_new = unit is None
        if unit is None:
            unit = self._add(module, ())
        unit.needs(self.chunks_of([parameter]))
        return unit, is_new

    def joined(self, module: nn.Module, parts: Iterable[int]) -> Unit:
        """A unit that brings with one module what several units (by index) bring; the same each time."""
        units = [self.all[index] for index in sorted(parts)]
        chunks = _in_order(chunk for unit in units for chunk in unit.chunks)
        known = self._joined.get(module)
        if known is None or known.chunks != chunks:
            besides = _in_order(chunk for unit in units for chunk in unit.without_gradients if chunk not in chunks)
            known = self._joined[module] = self._made(module, chunks, besides, is_joined=True)
        return known

    def _add(self, module: nn.Module, chunks: tuple[Chunk, ...], without_gradients: tuple[Chunk, ...] = ()) -> Unit:
        self.of[module] = unit = self._made(module, chunks, without_gradients)
        return unit

    def _made(
        self, module: nn.Module, chunks: tuple[Chunk, ...], besides: tuple[Chunk, ...], is_joined: bool = False
    ) -> Unit:
        name = self._names.get(module, type(module).__name__)
        unit = Unit(len(self.all), name, ref(module), chunks, besides, is_joined)
        self.all.append(unit)
        return unit


def _in_order(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    found = {chunk.index: chunk for chunk in chunks}
    return tuple(found[index] for index in sorted(found))


def own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that must be there when a module is called: its own, and those of what is compiled with it."""
    return module.parameters(recurse=is_compiled(module))


def parameters_of_fast_path(module: nn.Module) -> Iterator[Tensor]:
    """Further parameters that must be there when a module is called without gradients.

    Without gradients, some modules of torch give the parameters of their parts to one kernel, unless one of them is of
    a subclass: then they run part by part, which gives other numbers.
    """
    if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return module.parameters()
    if isinstance(module, nn.TransformerEncoder) and len(module.layers):
        first: nn.Module = module.layers[0]
        return first.parameters()
    return iter(())


def bracketed_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module but those within a compiled one, each once."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module not in seen:
            seen.add(module)
            yield module
            if not is_compiled(module):
                for child in module.children():
                    yield from walk(child)

    return walk(model)


def nested_parameters(model: nn.Module, key_of: Mapping[int, int]) -> list[tuple[str, frozenset[int]]]:
    """For each unit, by name, the parameters in use while it runs: its own and those of the units around it.

    ``key_of`` maps ids of parameters to what they are called in the result.
    """
    found = []

    def walk(module: nn.Module, name: str, outer: frozenset[int]) -> None:
        own = frozenset(key_of[id(p)] for p in own_parameters(module) if id(p) in key_of)
        if own:
            found.append((name, outer | own))
        if is_compiled(module):
            return
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}".lstrip("."), outer | own)

    walk(model, "", frozenset())
    return found
