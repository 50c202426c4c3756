"""A disk after a power cut: what ranks wrote, without what had not been synced."""

import random
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeAlias

from torchtrain.tools.faults.disk import Operation


@dataclass
class File:
    """A file: what is in it, and what of that is safe."""

    content: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """A folder: its names now, and since the last sync all states of them, the safe one first."""

    names: "dict[str, File | Folder]" = field(default_factory=dict)
    history: "list[dict[str, File | Folder]]" = field(default_factory=lambda: [{}])

    def change(self) -> None:
        """Note that the names have changed."""
        self.history.append(dict(self.names))


Entry: TypeAlias = File | Folder


class Disk:
    """What lies under a folder; operations are done on it in memory.

    Args:
        root: the folder's path in the operations.
        start: what lies there at first, synced; None: nothing.
    """

    def __init__(self, root: Path, start: Path | None = None) -> None:
        self.root = root
        self.tree = Folder() if start is None else read(start)

    def do(self, operation: Operation) -> None:
        """Do an operation. What fails on a real disk, as a name that is there, changes nothing."""
        path = PurePath(operation.path).relative_to(self.root)
        if operation.kind == "fsync":
            self._sync(self._find(path))
            return
        folder = self._find(path.parent)
        if not isinstance(folder, Folder):
            return
        entry = folder.names.get(path.name)
        if operation.kind == "rename":
            self._rename(folder, path.name, PurePath(operation.target).relative_to(self.root))
        elif operation.kind in ("create", "mkdir"):
            if entry is None:
                folder.names[path.name] = File() if operation.kind == "create" else Folder()
                folder.change()
        elif operation.kind in ("remove", "rmdir"):
            if folder.names.pop(path.name, None) is not None:
                folder.change()
        elif isinstance(entry, File):
            entry.content = changed(entry.content, operation)

    def _find(self, path: PurePath) -> "Entry | None":
        entry: Entry | None = self.tree
        for name in path.parts:
            entry = entry.names.get(name) if isinstance(entry, Folder) else None
        return entry

    def _sync(self, entry: "Entry | None") -> None:
        if isinstance(entry, File):
            entry.synced = entry.content
        elif isinstance(entry, Folder):
            entry.history = [dict(entry.names)]

    def _rename(self, folder: Folder, name: str, target: PurePath) -> None:
        there = self._find(target.parent)
        entry = folder.names.pop(name, None)
        if entry is None or not isinstance(there, Folder):
            return
        there.names[target.name] = entry
        folder.change()
        if there is not folder:
            there.change()

    def cut_power(self, target: Path, rng: random.Random) -> None:
        """Write to `target` what a power cut may leave.

        By chance nothing that was not synced, or all names and no such content, or of each folder
        the names of some moment since its last sync and of each file its content of then or now.
        """
        keep = rng.choice(["synced", "names", "some"])
        write(self.tree, target, keep, rng)


def changed(content: bytes, operation: Operation) -> bytes:
    """Return a file's content after it was written or cut."""
    at = operation.position
    if operation.kind == "truncate":
        return content[:at].ljust(at, b"\0")
    content = content.ljust(at, b"\0")
    return content[:at] + operation.data + content[at + len(operation.data) :]


def read(folder: Path) -> Folder:
    """Return what is in a folder, all of it synced."""
    names: dict[str, Entry] = {}
    for path in folder.iterdir():
        if path.is_dir():
            names[path.name] = read(path)
        else:
            content = path.read_bytes()
            names[path.name] = File(content, content)
    return Folder(names, [dict(names)])


def write(entry: Entry, path: Path, keep: str, rng: random.Random) -> None:
    """Write what is left of a file or folder after a power cut."""
    if isinstance(entry, File):
        is_whole = keep == "some" and rng.random() < 0.5
        path.write_bytes(entry.content if is_whole else entry.synced)
        return
    path.mkdir(exist_ok=True)
    states = {"synced": entry.history[0], "names": entry.history[-1]}
    names = states[keep] if keep in states else rng.choice(entry.history)
    for name, below in names.items():
        write(below, path / name, keep, rng)
