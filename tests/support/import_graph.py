"""Who imports whom, read from the sources with `ast`: those inside of functions count too.

A *room* of a floor is a folder or a file that lies directly in it; an *arrow* is one room that
imports another. Where arrows form no circle, every room has a height: 0 if it imports no other
room of its floor, else one more than the highest that it imports.

    python tests/support/import_graph.py [nodes/bridge quant …]     prints rooms, arrows, heights
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "quant", "accel", "nodes", "demo", "farm")


class Import(NamedTuple):
    """One imported name: the line, its absolute dotted name (in the package: without `nibble.`),
    and whether the import is relative.
    """

    line: int
    target: str
    inside: bool


def shipped() -> list[Path]:
    """Every Python file of the package."""
    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    return sorted([*files, *ROOT.glob("*.py")])


def dotted(path: Path) -> str:
    """quant/files/writer.py → quant.files.writer; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - (node.level - 1)]]
            if node.module:
                base += node.module.split(".")
            for alias in node.names:
                yield Import(node.lineno, ".".join([*base, alias.name]), True)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield Import(node.lineno, node.module, False)


class Graph(NamedTuple):
    """The rooms of a floor and, for each arrow (importing room, imported room), where it comes
    from: "file:line".
    """

    rooms: list[str]
    arrows: dict[tuple[str, str], list[str]]

    def below(self, room: str) -> set[str]:
        """The rooms that a room imports."""
        return {target for source, target in self.arrows if source == room}

    def heights(self) -> dict[str, int]:
        """Room → height. ValueError that names a circle."""
        heights: dict[str, int] = {}
        for room in self.rooms:
            self._visit(room, [], heights)
        return heights

    def _visit(self, room: str, path: list[str], heights: dict[str, int]) -> int:
        if room in path:
            raise ValueError("a circle: " + " → ".join([*path[path.index(room) :], room]))
        if room not in heights:
            below = [self._visit(name, [*path, room], heights) for name in self.below(room)]
            heights[room] = 1 + max(below, default=-1)
        return heights[room]


def graph(floor: str, loose: str | None = None) -> Graph:
    """The rooms of a floor, named by its folder ("quant", "nodes/bridge"), and their arrows.

    loose: one name for all files that lie directly in the folder; None: each is a room.
    """
    folder, prefix = ROOT / floor, floor.replace("/", ".") + "."
    files = [path for path in sorted(folder.rglob("*.py")) if path != folder / "__init__.py"]
    folders = {path.parent.name for path in folder.glob("*/*.py")}

    def room_of(name: str) -> str:
        room = name.removeprefix(prefix).split(".")[0]
        return room if loose is None or room in folders else loose

    arrows: dict[tuple[str, str], list[str]] = {}
    rooms = sorted({room_of(dotted(path)) for path in files})
    for path in files:
        source = room_of(dotted(path))
        for line, target, inside in imports(path):
            if inside and target.startswith(prefix) and room_of(target) != source:
                place = f"{path.relative_to(ROOT).as_posix()}:{line}"
                arrows.setdefault((source, room_of(target)), []).append(place)
    return Graph(rooms, arrows)


def main(floors: list[str]) -> None:
    for floor in floors:
        drawn = graph(floor)
        try:
            heights = drawn.heights()
        except ValueError as circle:
            heights = dict.fromkeys(drawn.rooms, 0)
            print(f"{floor} has {circle}")
        print(f"{floor}: {len(drawn.rooms)} rooms, {len(drawn.arrows)} arrows,", end=" ")
        print(f"{1 + max(heights.values(), default=0)} floors")
        for room in sorted(drawn.rooms, key=lambda room: (-heights[room], room)):
            print(f"  {heights[room]}  {room:<16} → {', '.join(sorted(drawn.below(room))) or '-'}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["nodes/bridge", "quant", "accel", "kernels"])
