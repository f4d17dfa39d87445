"""Every small file that Nibble writes: damaged in any way it is refused in one sentence that names
it, the same content gives the same bytes, and files of earlier versions are read.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_files
from damage import damages, joined, split
from nibble.accel.caf import heads_file
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.integrity import HEADER_SUM, SUMS
from nibble.quant.files.safetensors import read_header
from nibble.quant.training import state

KINDS = (
    "CAF",
    "CAF, whole layers",
    "IntLoRA",
    "training state",
    "couplings' index",
    "couplings' captions",
    "couplings' pairs",
)
SEEDS = range(2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_files.files(tmp_path_factory.mktemp("files"))


def unsealed(content: bytes) -> bytes:
    """The file as earlier versions wrote it, without checksums."""
    table, data = split(content)
    for key in (SUMS, HEADER_SUM):
        table["__metadata__"].pop(key, None)
    return joined(table, data)


def tried(path: Path, read, content: bytes) -> str | None:
    """What a reader says of a file with these bytes; None where it takes it."""
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        read(path)
    except FileRefused as refused:
        return str(refused)
    finally:
        path.write_bytes(whole)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_is_accepted(made, kind):
    path, read = made[kind]
    read(path)
    accepted, count = [], 0
    for seed in SEEDS:
        for what, content in damages(path, seed):
            count += 1
            said = tried(path, read, content)
            if said is None:
                accepted.append(what)
            else:
                named = path.name in said or path.parent.name in said
                assert named, f"{what}: {said}"
                assert said.endswith("."), f"{what}: {said}"
    # of files that earlier versions wrote too: this one is as theirs, with nothing else changed
    if kind in ("IntLoRA", "couplings' index"):
        theirs = (f"metadata without {HEADER_SUM}", "without checksum")
        accepted = [what for what in accepted if what not in theirs]
        accepted = [what for what in accepted if what != "checksum is None"]
    assert count > 30
    assert accepted == []


@pytest.mark.parametrize("kind", ["CAF", "training state"])
def test_of_files_without_checksums_all_else_is_checked(made, kind):
    path, read = made[kind]
    whole = unsealed(path.read_bytes())
    assert tried(path, read, whole) is None, "a file of an earlier version"
    old = path.with_name("old" + path.name)
    old.write_bytes(whole)
    seen = 0
    for what, content in damages(old, seed=5):
        said = tried(path, read, content)  # whatever it says, no other exception comes
        if what.startswith(("another shape", "NaN", "infinity", "a tensor left out", "metadata c")):
            seen += 1
            if kind == "CAF" and what != "another shape":
                assert said is not None or "facts" in what or "character" in what, what
    assert seen


def test_heads_of_unequal_ranks_are_refused_when_they_are_opened(tmp_path):
    path = tmp_path / "a.caf.safetensors"
    heads_file.save_file(small_files.heads(), path)
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    for key in (SUMS, HEADER_SUM):
        del metadata[key]
    wrong = {
        "ranks that differ": {"velocity.blocks.0.up": torch.zeros(6, 3)},
        "a rank that is not the file's": {
            f"{kind}.blocks.0.{part}": torch.zeros(shape)
            for kind in ("velocity", "acceleration")
            for part, shape in (("up", (6, 4)), ("down", (4, 6)))
        },
        "integers": {"velocity.blocks.0.up": torch.zeros(6, 2, dtype=torch.int32)},
        "two dtypes": {"velocity.blocks.0.up": torch.zeros(6, 2).half()},
        "other columns in one head": {"velocity.blocks.0.down": torch.zeros(2, 5)},
        "NaN": {"velocity.blocks.0.up": torch.full((6, 2), float("nan"))},
    }
    for what, changes in wrong.items():
        save_file(tensors | changes, path, metadata)
        with pytest.raises(FileRefused, match="a.caf.safetensors is damaged: .*train it again"):
            heads_file.read_file(path)
            pytest.fail(what)
    about = json.loads(metadata["caf"])
    for changes in ({"h": -0.1}, {"h": 2.5}, {"rank": True}, {"middle": 1.5}, {"facts": []}):
        metadata["caf"] = json.dumps(about | changes)
        save_file(tensors, path, metadata)
        with pytest.raises(FileRefused, match="a.caf.safetensors is damaged"):
            heads_file.read_file(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"a.down": torch.zeros(1, 16)}, r"a.down is torch.float32 \(1, 16\)"),
        ({"a.down": None}, "a.down is missing"),
        ({"a.up.exp_avg": torch.zeros(8, 1)}, r"a.up.exp_avg is torch.float32 \(8, 1\)"),
        ({"a.up.exp_avg": None}, "a.up.exp_avg is missing"),
        ({"b": torch.zeros(2)}, "it holds b, which this run does not train"),
        ({"a.up": torch.full((8, 4), torch.inf)}, "a.up holds values that are not finite"),
        ({"a.up.exp_avg_sq": -torch.ones(8, 4)}, "is a mean of squares"),
        ({"a.up": torch.zeros(8, 4, dtype=torch.int32)}, "a.up is torch.int32"),
    ],
)
def test_a_state_of_other_shapes_is_damaged_and_changes_nothing(tmp_path, change, said):
    """Without checksums, as earlier versions wrote them."""
    path = tmp_path / "a.intlora.state"
    small_files.train(path, steps=2)
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    for key in (SUMS, HEADER_SUM):
        del metadata[key]
    tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(FileRefused, match=f"a.intlora.state is damaged: .*{said}.*; delete it"):
        small_files.train(path)
    path.unlink()
    small_files.train(path)


@pytest.mark.parametrize("losses", ["[]", "[NaN]", '["a"]', "{}", "3", "[1e999]", None])
def test_a_state_without_its_losses_is_damaged(tmp_path, losses):
    path = tmp_path / "a.intlora.state"
    small_files.train(path, steps=2)
    metadata = {"format": state.FORMAT, "identity": state.State(path).identity}
    if losses is not None:
        metadata["losses"] = losses
    save_file(load_file(path), path, metadata)
    with pytest.raises(FileRefused, match="state is damaged: its losses .*; delete it"):
        small_files.train(path)


def test_the_same_content_gives_the_same_bytes_in_every_process(made, tmp_path):
    """Names and metadata in hash order would differ from one process to the next."""
    code = "import sys, checkout, small_files, pathlib;small_files.files(pathlib.Path(sys.argv[1]))"
    again = tmp_path / "again"
    again.mkdir()
    support = Path(__file__).parent / "support"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, cwd=support)
    here = made["CAF"][0].parent
    for path in sorted(path for path in again.rglob("*") if path.is_file()):
        assert path.read_bytes() == (here / path.relative_to(again)).read_bytes(), path.name
