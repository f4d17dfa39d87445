"""What .github/workflows/ runs: the tests in a real ComfyUI on every pair of system, Python, torch
and ComfyUI; and commands that are there.
"""

import itertools
import re

import pytest

import nibble
from checkout import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
READ = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
FACTORS = ("os", "python", "torch", "comfyui")


def steps():
    """(workflow, what a step runs)"""
    return [
        (name, step["run"])
        for name, workflow in READ.items()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]


def test_comfyui_is_tried_on_every_pair():
    rows = READ["tests"]["jobs"]["comfyui"]["strategy"]["matrix"]["include"]
    values = {factor: {row[factor] for row in rows} for factor in FACTORS}
    assert values == {
        "os": {"ubuntu-latest", "windows-latest", "macos-latest"},
        "python": {"3.10", "3.13"},
        "torch": {"2.7", "newest"},
        "comfyui": {f"v{nibble.COMFYUI}", "master"},
    }
    for first, second in itertools.combinations(FACTORS, 2):
        tried = {(row[first], row[second]) for row in rows}
        assert tried == set(itertools.product(values[first], values[second])), (first, second)
    assert len(rows) == 6  # as few as three systems times two of the others can be


def test_the_names_of_runs_say_what_they_are_of():
    named = READ["tests"]["jobs"]["comfyui"]["name"]
    assert all(f"matrix.{factor}" in named for factor in FACTORS)


def test_files_and_make_targets_of_the_workflows_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    paths, targets = set(), set()
    for _, run in steps():
        paths |= set(re.findall(r"\b(?:tests|kernels)/[\w./-]*\w", run))
        targets |= set(re.findall(r"\bmake (?:-k )?([\w-]+)", run))
    made = {path for path in paths if path.startswith(("kernels/cubins", "kernels/libraries"))}
    assert len(paths) > 6
    assert all((ROOT / path).exists() for path in paths - made)
    assert targets == {"lint", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_commands_of_the_package_in_the_workflows_are_there():
    main = (ROOT / "__main__.py").read_text(encoding="utf-8")
    words = {word for _, run in steps() for word in re.findall(r"-m nibble (\w+)", run)}
    assert words == {"cubins", "libraries"}
    assert all(f'"{word}"' in main for word in words)
