"""Imports go down only. The order of the layers is the table below; a new module needs a place in it."""

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From low to high: a module may import its own row and the rows before it, never a later one. The names are the parts
# after `gemini.`; a package stands for all of its modules.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "sizes",
        "arguments",
        "cores",
        "environment",
        "system_limits",
        "initialize",
        "process_wide",
        "safe_files",
        "signals",
        "torch_private",
        "colossal",
    ),
    ("formats",),
    ("accelerator", "cluster", "logging", "pipeline", "shardformer", "utils"),
    ("chunk", "lazy", "telemetry"),
    ("lease",),
    ("ranks", "tensor_parallel"),
    ("planning", "units", "nn"),
    ("config", "quantization"),
    ("memory",),
    ("activations",),
    ("updates",),
    ("packing", "engine"),
    ("runtime",),
    ("step",),
    ("monitor",),
    ("stat",),
    ("estimate",),
    ("boosted",),
    ("checkpoint",),
    ("boosting",),
    ("booster",),
    ("integrations",),
    ("train",),
)

# Packages that know nothing of the rest: besides themselves they may import only these.
ISOLATED: Mapping[str, frozenset[str]] = {
    "colossal": frozenset(),
    **dict.fromkeys(("accelerator", "cluster", "logging", "pipeline", "shardformer", "utils"), frozenset({"colossal"})),
    "chunk": frozenset({"errors", "sizes", "process_wide", "safe_files", "signals", "system_limits", "torch_private"}),
    "lazy": frozenset({"errors", "arguments", "torch_private"}),
    "formats": frozenset({"cores", "process_wide", "safe_files", "signals"}),
    "telemetry": frozenset({"sizes", "arguments", "process_wide", "safe_files"}),
    "lease": frozenset({"telemetry", "sizes", "arguments", "process_wide", "safe_files"}),
    "stat": frozenset(
        {"telemetry", "lease", "formats", "sizes", "arguments", "cores", "process_wide", "safe_files", "signals"}
    ),
}

# Decide without tensors: neither they nor any module of ours that they import may import torch. It is the modules that
# count: `gemini.chunk.tier` is free of torch although its package's __init__ is not.
WITHOUT_TORCH = (
    "planning",
    "packing.problem",
    "packing.solve",
    "memory.non_model",
    "sizes",
    "arguments.rules",
    "arguments.places",
    "cores",
    "environment",
    "process_wide",
    "safe_files",
    "signals",
    "formats",
    "telemetry",
    "lease",
    "stat",
)

HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def sources(root: Path = ROOT) -> dict[str, str]:
    """Source text by module name; the folders chunk and lazy are gemini.chunk and gemini.lazy."""
    found = {}
    for top in ("gemini", "chunk", "lazy"):
        for file in sorted((root / top).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if parts[:2] in (("gemini", "chunk"), ("gemini", "lazy")):
                continue  # Python 3.13's rglob follows the links
            name = ".".join(parts if top == "gemini" else ("gemini", *parts))
            found[name] = file.read_text()
    return found


def imports(name: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """Absolute names of what module ``name`` imports, also inside functions and under TYPE_CHECKING."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                # `from gemini import x`: a submodule, or an export that stands for a high layer
                is_module = inner in known or f"{inner}.__init__" in known
                yield inner if is_module or module == "gemini" else module


def violations(modules: Mapping[str, str]) -> list[str]:
    graph = {name: sorted(set(imports(name, source, modules))) for name, source in modules.items()}
    known = {_layer(name) for name in modules}
    found = []
    for name, targets in graph.items():
        if _is_new(name):
            found.append(f"{name}: has no place in LAYERS of tests/test_layers.py: add it")
        for target in targets:
            found += _check(name, target, known)
        if way := _way_to_torch(name, graph):
            found.append(f"{name}: reaches torch through {' -> '.join(way)}")
    return found


def _layer(module: str) -> str:
    """``engine`` of ``gemini.engine.engine`` and of ``gemini.engine.engine.x``; empty for gemini/__init__.py."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


def _is_new(name: str) -> bool:
    layer = _layer(name)
    return layer not in HEIGHT and layer not in ISOLATED and layer != ""


def _check(name: str, target: str, known: Set[str]) -> Iterator[str]:
    here = _layer(name)
    if target.split(".")[0] in ("chunk", "lazy"):
        yield f"{name}: imports {target}, whose name is gemini.{target} (a top-level `chunk` is Python's own)"
    if target.split(".")[0] != "gemini" or here == "" or target == "gemini.__version__":
        return  # gemini/__init__.py exports names of all layers, each on first use
    there = _layer(target)
    if here in ISOLATED:
        if there != here and there not in ISOLATED[here]:
            yield f"{name}: imports {target}; {here} may import only itself and {sorted(ISOLATED[here])}"
    elif _is_new(target):
        if there not in known:  # a new module is reported once, as such
            yield f"{name}: imports {target}; import it from where it is defined"
    elif HEIGHT.get(there, len(LAYERS)) > HEIGHT.get(here, len(LAYERS)):
        yield f"{name}: imports {target}, which is in a higher layer"


def _way_to_torch(name: str, graph: Mapping[str, list[str]]) -> list[str]:
    if not any(f"{name}.".startswith(f"gemini.{room}.") for room in WITHOUT_TORCH):
        return []
    ways = [[name]]
    seen = {name}
    while ways:
        way = ways.pop()
        for target in graph.get(way[-1], graph.get(f"{way[-1]}.__init__", [])):
            if target.split(".")[0] == "torch":
                return [*way[1:], target]
            if target not in seen and target.startswith("gemini."):
                seen.add(target)
                ways.append([*way, target])
    return []


def test_imports_go_down_only() -> None:
    found = violations(sources())
    assert not found, "\n" + "\n".join(found)


def test_all_three_folders_are_looked_at() -> None:
    names = sources()
    for prefix in ("gemini.chunk.", "gemini.lazy.", "gemini.stat.", "gemini.errors"):
        assert any(name.startswith(prefix) for name in names), prefix


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("gemini.chunk.bad", "import gemini.engine.engine", "chunk may import only itself"),
        ("gemini.chunk.bad", "from gemini.lazy import x", "chunk may import only itself"),
        ("gemini.lazy.bad", "from ..chunk import Tier", "lazy may import only itself"),
        ("gemini.lazy.bad", "from ..planning import trace", "lazy may import only itself"),
        ("gemini.nn.optimizer.bad", "def f():\n    from ...engine.engine import x", "higher layer"),
        ("gemini.engine.engine", "from gemini.booster import Booster", "higher layer"),
        ("gemini.engine.engine", "from gemini import Booster", "from where it is defined"),
        ("gemini.checkpoint.bad", "from ..train import main", "higher layer"),
        ("gemini.engine.engine", "from ..stat.cli import main", "higher layer"),
        ("gemini.stat.bad", "from gemini.memory.tracker import host_budget", "stat may import only itself"),
        ("gemini.planning.trace", "import torch.nn", "reaches torch through torch.nn"),
        (
            "gemini.planning.planner",
            "from ..chunk.bytes import Tier",
            "reaches torch through gemini.chunk.bytes -> torch",
        ),
        ("gemini.newcomer", "", "has no place in LAYERS"),
        ("gemini.engine.engine", "import chunk", "whose name is gemini.chunk"),
    ],
)
def test_the_check_fires(name: str, source: str, message: str) -> None:
    modules = {"gemini.chunk.bytes": "from torch import Tensor", "gemini.planning.trace": "", name: source}
    (found,) = violations(modules)
    assert message in found
    assert found.startswith(name)


def test_what_goes_down_passes() -> None:
    modules = {
        "gemini.__init__": "from gemini.booster import Booster",
        "gemini.booster.__init__": "from gemini.chunk import Tier\nfrom gemini import __version__",
        "gemini.booster.plugin": "import torch\nfrom ..runtime import y\nimport gemini.errors",
        "gemini.chunk.disk": "from .tier import Tier\nfrom gemini.errors import OffloadError",
        "gemini.chunk.tier": "import enum",
        "gemini.planning.planner": "from .trace import Trace\nfrom .chunk.tier import Tier",
    }
    assert violations(modules) == []
