"""What may be on a disk after a power loss, from the calls that a process has made.

A model of a file system that promises nothing but what POSIX says: `fsync` of a file keeps its bytes, `fsync` of a
folder the names in it. Names change atomically; whatever has not been forced to the disk may be there or not, in any
combination. Real file systems keep more than that, in order.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from operations import Call

Change = tuple[int, str, int | None]
"""Folder, name, and what has the name from now on; None: nothing."""
Tree = dict[str, bytes | str | None]
"""Relative path -> bytes of a file, target of a symlink, or None for a folder."""


@dataclass
class _Node:
    """A file, folder or symlink; folders have names only in `Disk`."""

    data: bytes | str | None
    """As the running system sees it; None for a folder."""
    kept: bytes | str | None
    """As it is on the disk for certain."""


@dataclass
class Disk:
    """A folder tree, as the system sees it and as it is certainly on the disk."""

    nodes: dict[int, _Node] = field(default_factory=dict)
    names: dict[tuple[int, str], int] = field(default_factory=dict)
    """(folder, name) -> node, as the system sees it."""
    kept_names: dict[tuple[int, str], int] = field(default_factory=dict)
    pending: list[list[Change]] = field(default_factory=list)
    """Changes of names, each of them atomic, that are not certainly on the disk."""

    @classmethod
    def of(cls, root: Path) -> "Disk":
        """All that is there is on the disk."""
        disk = cls()
        disk.nodes[0] = _Node(None, None)
        hard: dict[tuple[int, int], int] = {}
        ids = {root: 0}
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            same = hard.get((status.st_dev, status.st_ino)) if not path.is_dir() else None
            if same is None:
                data = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
                same = disk._add(data)
                disk.nodes[same].kept = data
                hard[status.st_dev, status.st_ino] = same
            ids[path] = same
            disk.names[ids[path.parent], path.name] = same
        disk.kept_names = dict(disk.names)
        return disk

    def apply(self, call: Call, root: Path) -> None:
        """Do what a call has done."""
        node, place = self._find(call.path, root), self._place(call.path, root)
        match call.kind:
            case "create" | "mkdir" | "symlink":
                data = {"create": b"", "mkdir": None, "symlink": call.data.decode()}[call.kind]
                new = self._add(data)
                if call.kind != "create":
                    self.nodes[new].kept = data
                self._rename([(*place, new)])
            case "write":
                self._write(node, call.offset, call.data)
            case "reserve":
                self._write(node, call.offset, b"")
            case "truncate":
                self.nodes[node].data = bytes(self.nodes[node].data or b"")[: call.offset].ljust(call.offset, b"\0")
            case "rename":
                self._rename([(*place, None), (*self._place(call.other, root), node)])
            case "link":
                self._rename([(*self._place(call.other, root), node)])
            case "unlink" | "rmdir":
                self._rename([(*place, None)])
            case "fsync":
                if node < 0:  # written by code in C
                    node = self._add(call.data)
                    self.nodes[node].data = call.data
                    self._rename([(*place, node)])
                self.nodes[node].kept = self.nodes[node].data
            case "fsync_folder":
                self._force(node)
            case "open":
                pass
            case _:
                raise AssertionError(call)

    def after_power_loss(self, rng: random.Random, most: int = 8) -> Iterator[Tree]:
        """What may be there: nothing of what is pending, all of it, all but one, one alone, and combinations.

        Bytes of files that have not been synced are whole, missing, or zeros.
        """
        count = len(self.pending)
        choices = {(False,) * count, (True,) * count}
        if count <= 3:
            choices |= set(product((False, True), repeat=count))
        else:
            for i in range(count):
                choices.add(tuple(k == i for k in range(count)))
                choices.add(tuple(k != i for k in range(count)))
                choices.add(tuple(k <= i for k in range(count)))
            choices |= {tuple(rng.random() < 0.5 for _ in range(count)) for _ in range(most)}
        for chosen in sorted(choices):
            names = dict(self.kept_names)
            for change, is_there in zip(self.pending, chosen, strict=True):
                if is_there:
                    _change(names, change)
            yield from self._trees(names)

    # -- inside

    def _trees(self, names: dict[tuple[int, str], int]) -> Iterator[Tree]:
        reads: list[Callable[[_Node], Any]] = [lambda node: node.data, lambda node: node.kept]
        reads.append(lambda node: node.data if node.data == node.kept else b"\0" * len(node.data or b""))
        found: list[Tree] = []
        for read in reads:
            tree: Tree = {}
            self._walk(0, "", names, read, tree)
            if tree not in found:
                found.append(tree)
                yield tree

    def _walk(
        self, folder: int, prefix: str, names: dict[tuple[int, str], int], read: Callable[[_Node], Any], tree: Tree
    ) -> None:
        for (parent, name), node in names.items():
            if parent == folder:
                tree[prefix + name] = read(self.nodes[node]) if self.nodes[node].data is not None else None
                if self.nodes[node].data is None:
                    self._walk(node, f"{prefix}{name}/", names, read, tree)

    def _add(self, data: bytes | str | None) -> int:
        self.nodes[len(self.nodes)] = _Node(data, b"" if isinstance(data, bytes) else data)
        return len(self.nodes) - 1

    def _find(self, path: Path, root: Path) -> int:
        node = 0
        for name in path.relative_to(root).parts:
            node = self.names.get((node, name), -1)
        return node

    def _place(self, path: Path | None, root: Path) -> tuple[int, str]:
        assert path is not None
        return self._find(path.parent, root) if path != root else -1, path.name

    def _write(self, node: int, offset: int, data: bytes) -> None:
        old = self.nodes[node].data
        assert isinstance(old, bytes)
        self.nodes[node].data = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]

    def _rename(self, change: Sequence[Change]) -> None:
        _change(self.names, change)
        self.pending.append(list(change))

    def _force(self, folder: int) -> None:
        for change in [each for each in self.pending if any(parent == folder for parent, _, _ in each)]:
            _change(self.kept_names, change)
            self.pending.remove(change)
            # What an earlier change has said of these names does not come after this one.
            places = {(parent, name) for parent, name, _ in change}
            before = [each for each in self.pending if any((p, n) in places for p, n, _ in each)]
            for other in before:
                other[:] = [c for c in other if (c[0], c[1]) not in places]
        self.pending = [each for each in self.pending if each]


def _change(names: dict[tuple[int, str], int], change: Sequence[Change]) -> None:
    for parent, name, node in change:
        if node is None:
            names.pop((parent, name), None)
        else:
            names[parent, name] = node


class Recorded:
    """A hook that carries calls out and remembers those that succeeded."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        result = perform()
        if call.kind == "fsync":
            call = replace(call, data=call.path.read_bytes())
        self.calls.append(call)
        return result


def trees(root: Path, before: Disk, calls: Sequence[Call], rng: random.Random) -> Iterator[tuple[int, Tree]]:
    """Everything that may be on the disk after each number of calls, each once."""
    seen: set[Any] = set()
    for n in range(len(calls) + 1):
        for tree in before.after_power_loss(rng):
            key = tuple(sorted(tree.items(), key=lambda item: item[0])), n == len(calls)
            if key not in seen:
                seen.add(key)
                yield n, tree
        if n < len(calls):
            before.apply(calls[n], root)


def tree_of(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def seen_tree(disk: Disk) -> Tree:
    """As the running system sees it."""
    tree: Tree = {}
    disk._walk(0, "", disk.names, lambda node: node.data, tree)
    return tree


def write_tree(folder: Path, tree: Tree) -> None:
    for name, data in sorted(tree.items()):
        path = folder / name
        if data is None:
            path.mkdir(parents=True)
        elif isinstance(data, str):
            path.symlink_to(data)
        else:
            path.write_bytes(data)
