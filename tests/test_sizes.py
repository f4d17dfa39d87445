"""The house's promises of size: short files, short lines, short functions."""

import ast
import re
from pathlib import Path
from statistics import median, quantiles

import pytest

from support.import_graph import ROOT, shipped

SOURCES = {".py", ".mjs", ".js", ".cu", ".cuh", ".cpp", ".h", ".inl", ".cmake"}
FREE = re.compile(r"https?://\S+|\s+# (noqa|type: ignore|pragma)\b.*$")


def is_ours(path: Path) -> bool:
    """Neither made by a tool nor downloaded."""
    parts = path.relative_to(ROOT).parts
    return not any(part.startswith(".") or part in ("build", "node_modules") for part in parts)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


OURS = sorted(path for path in ROOT.rglob("*") if path.suffix in SOURCES and is_ours(path))


@pytest.mark.parametrize("path", OURS, ids=named)
def test_files_stay_under_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", OURS, ids=named)
def test_lines_stay_under_100_columns(path):
    """Addresses and words for the linter do not count."""
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [i + 1 for i, line in enumerate(lines) if len(FREE.sub("", line)) > 100]
    assert not long, f"{named(path)}: lines {long}"


def function_lengths(path: Path) -> list[int]:
    """Lines of every function in a file, from `def` to its end, without its docstring."""
    lengths = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            lengths.append(lines)
    return lengths


def test_functions_are_short():
    """The linter bounds each one in statements; here the house as a whole, in lines."""
    lengths = [length for path in shipped() for length in function_lengths(path)]
    assert median(lengths) <= 8
    assert quantiles(lengths, n=10)[-1] <= 30
