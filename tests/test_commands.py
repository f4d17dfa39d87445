"""Every command that README.md, the help pages and the documents print works as it is printed: in
this environment, and (--slow) in a new one with nothing but torch and requirements.txt.

A page's commands begin with `python ComfyUI-Nibble`; what follows is parsed by the terminal's own
parser. Those that take seconds are run, on small files of the names that are printed.

Only parsed: `--preset best` and `demo` (minutes), text encoders (gigabytes), `bench NAME`,
`cubins`, `libraries` (a GPU, a compiler, hours), `farm` (a cluster; tests/farm runs it).
`…` and options alone are no whole commands: what they name must exist.

NIBBLE_CLEAN_PYTHON: a Python to take for the new environment; NIBBLE_TORCH_INDEX: where pip finds
torch for it.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import archive
import check
import pytest
import torch
from safetensors.torch import save_file

from checkout import ROOT
from nibble.quant.files.known_shapes import flux1_shapes
from published_files import RandomFlux

cli = importlib.import_module("nibble.__main__")
PRINTING = ("models", "file-format", "questions", "several-machines", "farm")
PAGES = [ROOT / "README.md", *sorted((ROOT / "web" / "docs").rglob("*.md"))]
PAGES += [ROOT / "docs" / f"{name}.md" for name in PRINTING]
BEGINS = "python ComfyUI-Nibble"
UNPARSED = ("bench", "cubins", "libraries")  # they have parsers of their own
PARSED_ONLY = re.compile(r"--preset best|t5xxl|^(demo|farm|bench \w|cubins|libraries)")


def printed() -> dict[str, str]:
    """Command, without its beginning → the first page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        pieces = re.findall(r"`([^`\n]+)`", text)
        for block in re.findall(r"```\n(.*?)```", text, re.S):
            pieces += block.splitlines()
        for piece in pieces:
            if piece.startswith(BEGINS):
                command = shlex.join(shlex.split(piece, comments=True)[2:])
                found.setdefault(command, page.relative_to(ROOT).as_posix())
    for line in cli.examples("X").splitlines():
        if line.strip().startswith("X "):
            found.setdefault(shlex.join(shlex.split(line)[1:]), "--help")
    return found


def is_whole(command: str) -> bool:
    """Whether the parser takes it: not only a command's name, and perhaps an option."""
    name, *arguments = shlex.split(command) or [""]
    if name in UNPARSED:
        return bool(arguments) or name != "bench"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            cli._parser().parse_args([name, *arguments])
    except SystemExit:
        return False
    return True


# what stands for a name that the reader chooses
PLACES = {"FILE": "file.safetensors", "文件": "文件.safetensors"}
PLACES |= {"NEW": "new.safetensors", "新文件": "新文件.safetensors"}
PRINTED = printed()
WHOLE = sorted(filter(is_whole, PRINTED))
RUN = [command for command in WHOLE if not PARSED_ONLY.search(command)]


def test_pages_print_commands():
    assert len(RUN) >= 12
    assert {shlex.split(command)[0] for command in RUN} >= {
        "quantize",
        "inspect",
        "plan",
        "convert",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_prints_what_only_an_installed_package_has(page):
    assert "python -m nibble" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", WHOLE)
def test_a_whole_command_is_one_of_the_parser(command):
    name, *arguments = shlex.split(command)
    if name == "bench" and arguments != ["--env"]:
        assert f"bench_{arguments[0]}" in {path.stem for path in cli.BENCHES.glob("*.py")}
    elif name not in UNPARSED:
        assert callable(cli._parser().parse_args([name, *arguments]).run)


@pytest.mark.parametrize("command", sorted(PRINTED.keys() - set(WHOLE)))
def test_what_a_part_of_a_command_names_exists(command, capsys):
    name, *arguments = shlex.split(command) or [""]
    if name in ("", "…"):
        return
    with pytest.raises(SystemExit):
        cli._parser().parse_args([name, "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in arguments if word.startswith("--"))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """What the printed names stand for, by command."""
    folder = tmp_path_factory.mktemp("printed")
    model, own, lora = (folder / f"{name}.safetensors" for name in ("16bit", "own", "lora"))
    published = folder / "published"
    draw, shapes = torch.Generator().manual_seed(0), flux1_shapes(1, 1, 128, 64, 64)
    save_file(
        {name: (torch.randn(s, generator=draw) * 0.05).bfloat16() for name, s in shapes.items()},
        model,
    )
    quick = ["--rank", "16", "--solver", "svd", "--memory-cap", "0"]
    assert cli.main(["quantize", str(model), str(own), *quick]) == 0
    blocks, others = RandomFlux(single=1).nunchaku()
    published.mkdir()
    for name, tensors in (("transformer_blocks", blocks), ("unquantized_layers", others)):
        save_file(tensors, published / f"{name}.safetensors")
    save_file(nunchaku_lora(), lora)
    return {
        "quantize": {"flux1-dev.safetensors": model, "model.safetensors": model},
        "inspect": {
            "flux1-dev-svdq.safetensors": own,
            "flux1-dev-svdq-int4.safetensors": own,
            "file.safetensors": own,
            "文件.safetensors": own,
        },
        "convert": {
            "svdq-int4_r32-flux.1-dev.safetensors": published,
            "nunchaku-lora.safetensors": lora,
            "nunchaku.safetensors": lora,
            "file.safetensors": published,
            "文件.safetensors": published,
        },
    }


def nunchaku_lora() -> dict[str, torch.Tensor]:
    """A LoRA of rank 16 in Nunchaku's own form on a layer of a FLUX.1."""
    name = "transformer_blocks.0.mlp_fc1"
    return {f"{name}.lora_down": torch.zeros(3072, 16), f"{name}.lora_up": torch.zeros(12288, 16)}


def works(python: str, plugin: Path, command: str, folder: Path, files: dict) -> None:
    """Runs a command as it is printed, in a folder of its own beside the plugin."""
    (folder / "ComfyUI-Nibble").symlink_to(plugin)
    words = [PLACES.get(word, word) for word in shlex.split(command)]
    for name, path in files.get(words[0], {}).items():
        if name in words:
            (folder / name).symlink_to(path)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "ComfyUI-Nibble", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env=kept | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", RUN)
def test_a_printed_command_runs(command, tmp_path, files):
    works(sys.executable, ROOT, command, tmp_path, files)


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """(Python, plugin) of a new environment: what the registry takes, and its requirements."""
    folder = tmp_path_factory.mktemp("clean")
    archive.write(folder / "nibble.zip", tuple(archive.included()))
    plugin = folder / "custom_nodes" / "ComfyUI-Nibble"
    check.unpack(folder / "nibble.zip", plugin)
    python = os.environ.get("NIBBLE_CLEAN_PYTHON")
    if python is None:
        index = os.environ.get("NIBBLE_TORCH_INDEX")
        python = str(check.environment(folder / "venv", "torch", index))
    return python, plugin


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_printed_command_runs_in_a_new_environment(command, tmp_path, files, clean):
    works(*clean, command, tmp_path, files)


@pytest.mark.slow
def test_an_installed_package_has_the_command_without_torch(tmp_path):
    python = check.environment(tmp_path / "venv", None, None)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT], check=True)
    for start in ([python.with_name("nibble")], [python, "-m", "nibble"]):
        run = {"capture_output": True, "text": True, "cwd": tmp_path}
        assert subprocess.run([*start, "--version"], **run).stdout.startswith("nibble ")
        assert "quantize" in subprocess.run([*start, "--help"], **run).stdout
        refused = subprocess.run([*start, "inspect", "x.safetensors"], **run)
        assert refused.returncode == 1
        assert refused.stderr == "nibble: torch is not installed; pip install torch\n"
