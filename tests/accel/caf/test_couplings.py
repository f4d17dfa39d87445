"""Couplings on disk: pairs that do not depend on how they were made, a folder that survives a crash
anywhere, and refusals in words.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.accel.caf import conditioning_tree, couplings
from nibble.quant.files import small
from nibble.quant.files.errors import FileRefused

SHAPE = (2, 3, 4)
IDENTITY = {"seed": 7, "shape": SHAPE, "sigmas": [1.0, 0.5, 0.0]}
PROMPTS = [
    [torch.arange(6.0).reshape(1, 2, 3), {"pooled_output": torch.ones(1, 3), "guidance": 3.5}],
    [torch.zeros(1, 2, 3), {"guidance": None}],
]


def teacher(noise: torch.Tensor, captions: list[int]) -> torch.Tensor:
    """A deterministic map that works on each picture alone."""
    return torch.stack([noise[k] * 0.5 + caption for k, caption in enumerate(captions)])


def make(
    folder: Path, count: int, batch: int = 1, identity=IDENTITY, prompts=PROMPTS, **options
) -> couplings.Couplings:
    """What the node does: adds what is missing, batch by batch."""
    found = couplings.create(folder, identity, prompts, **options)
    missing = [i for i in range(count) if i not in found]
    while missing:
        first, run = missing[0], missing[:batch]
        run = [i for k, i in enumerate(run) if i == first + k]
        noise = torch.cat([couplings.noise(identity["seed"], i, SHAPE) for i in run])
        captions = [i % len(prompts) for i in run]
        found.add(first, noise, teacher(noise, captions), captions)
        missing = missing[len(run) :]
    return found


def contents(found: couplings.Couplings) -> tuple:
    return found.digest(), [
        (noise.tolist(), data.tolist(), caption)
        for noise, data, caption in map(found.pair, range(len(found)))
    ]


def test_a_pair_comes_back_with_its_prompt(tmp_path):
    found = make(tmp_path / "a", 5, batch=2)
    noise, data, caption = found.pair(3)
    assert torch.equal(noise, torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(10)))
    assert caption == 1
    assert torch.equal(data, noise * 0.5 + 1)
    assert data.dtype == torch.float32
    tensor, extras = couplings.read(tmp_path / "a").captions[0]
    assert torch.equal(tensor, PROMPTS[0][0])
    assert torch.equal(extras.pop("pooled_output"), torch.ones(1, 3))
    assert extras == {"guidance": 3.5}
    noise, data, captions = couplings.read(tmp_path / "a").batch([4, 1])
    assert noise.shape == data.shape == (2, *SHAPE)
    assert captions == [0, 1]
    assert torch.equal(data[1:], found.pair(1)[1])
    assert found.shape == SHAPE
    assert len(found) == 5
    assert found.nbytes == sum(
        path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name != "couplings.json"
    )


def test_resumed_grown_and_in_other_batches_it_is_the_same(tmp_path):
    whole = contents(make(tmp_path / "whole", 7, batch=3))
    make(tmp_path / "grown", 2)
    make(tmp_path / "grown", 4, batch=4)
    assert (
        contents(make(tmp_path / "grown", 7, batch=2))
        == whole
        == contents(couplings.read(tmp_path / "grown"))
    )
    assert contents(make(tmp_path / "grown", 3)) == whole, "fewer: what is there stays"
    few = couplings.read(tmp_path / "whole").limited(4)
    assert len(few) == 4
    assert few.digest() != whole[0] == make(tmp_path / "whole", 7).digest()
    assert few.digest() == make(tmp_path / "four", 4).digest()
    assert contents(few)[1] == whole[1][:4]


def test_pairs_of_one_prompt_may_be_stored_together_and_leave_gaps(tmp_path):
    found = couplings.create(tmp_path / "a", IDENTITY, PROMPTS)
    noise = torch.cat([couplings.noise(7, i, SHAPE) for i in (1, 3)])
    found.add([1, 3], noise, teacher(noise, [1, 1]), [1, 1])
    assert [i in found for i in range(4)] == [False, True, False, True]
    assert len(found) == 2
    assert torch.equal(couplings.read(tmp_path / "a").pair(1)[0], noise[1:])
    assert make(tmp_path / "a", 4, batch=4).digest() == make(tmp_path / "b", 4).digest()


class Crash(BaseException):
    """The machine stops here."""


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing another run"])
def test_a_crash_at_any_write_is_gone_on_from(tmp_path, monkeypatch, late, replacing):
    wanted, crashes = contents(make(tmp_path / "wanted", 3)), 0
    while True:
        folder, left = tmp_path / str(crashes), crashes
        if replacing:
            make(folder, 2, identity=IDENTITY | {"seed": 8}, prompts=PROMPTS[:1])

        def counted(operation):
            def run(*args, **options):
                nonlocal left
                left -= 1
                if left == -1 and not late:
                    raise Crash
                done = operation(*args, **options)
                if left == -1:
                    raise Crash
                return done

            return run

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                make(folder, 3, overwrite=replacing)
                break
            except Crash:
                crashes += 1
        try:
            assert all(couplings.read(folder).captions)
        except FileRefused as refused:
            assert " holds no " in str(refused), "nothing yet, but nothing damaged"
        done = couplings.create(folder, IDENTITY, PROMPTS, overwrite=replacing)
        assert all(
            torch.equal(done.pair(i)[1], teacher(done.pair(i)[0], [done.pair(i)[2]]))
            for i in range(len(done))
        )
        assert contents(make(folder, 3, batch=2)) == wanted == contents(couplings.read(folder))
        assert len(list(folder.glob("captions-*"))) == 1
        assert not list(folder.glob("*.part*"))
    assert crashes >= 10 + 2 * replacing


@pytest.mark.parametrize(
    "changed, prompts, said",
    [
        ({"seed": 8}, PROMPTS, "its seed is 7, and 8 is asked for"),
        ({"cfg": 2.0}, PROMPTS, "its cfg is none, and 2.0 is asked for"),
        ({"sigmas": [1.0] * 50}, PROMPTS, r"its sigmas is \[1.0, 0.5, 0.0\]"),
        ({}, PROMPTS[:1], "its prompts are others"),
        ({}, [PROMPTS[0], [torch.zeros(1, 2, 3), {"guidance": 3.5}]], "its prompts are others"),
    ],
)
def test_another_run_is_refused_and_overwrite_replaces_it(tmp_path, changed, prompts, said):
    make(tmp_path / "a", 2)
    with pytest.raises(
        FileRefused,
        match=f"^a holds couplings of another run: .*{said}.*overwrite.*another filename",
    ):
        make(tmp_path / "a", 2, identity=IDENTITY | changed, prompts=prompts)
    assert (
        make(
            tmp_path / "a", 2, identity=IDENTITY | changed, prompts=prompts, overwrite=True
        ).digest()
        == couplings.read(tmp_path / "a").digest()
    )
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_pairs_of_another_run_never_mix_even_without_an_index(tmp_path):
    make(tmp_path / "a", 3)
    (tmp_path / "a" / "couplings.json").unlink()
    with pytest.raises(
        FileRefused,
        match="a holds pairs of another run .pairs-00000000.safetensors.; turn on overwrite",
    ):
        make(tmp_path / "a", 1, identity=IDENTITY | {"seed": 8})
    make(tmp_path / "a", 1, identity=IDENTITY | {"seed": 8}, overwrite=True)
    assert len(list((tmp_path / "a").glob("pairs-*"))) == 1 == len(couplings.read(tmp_path / "a"))


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_damaged_file_is_refused_by_name_and_its_pairs_are_made_again(tmp_path, length):
    before = contents(make(tmp_path / "a", 4, batch=2))
    shard = tmp_path / "a" / "pairs-00000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    for opened in (lambda: couplings.read(tmp_path / "a"), lambda: make(tmp_path / "a", 4)):
        with pytest.raises(
            FileRefused, match="pairs-00000002.safetensors is damaged; delete this file"
        ):
            opened()
    shard.unlink()
    assert len(couplings.read(tmp_path / "a")) == 2
    assert contents(make(tmp_path / "a", 4)) == before


def test_a_flipped_bit_is_found_when_the_pair_is_read(tmp_path):
    make(tmp_path / "a", 2, batch=2)
    shard = tmp_path / "a" / "pairs-00000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1  # in the noise of the last pair, as names are sorted
    shard.write_bytes(content)
    found = couplings.read(tmp_path / "a")
    found.pair(0)
    with pytest.raises(FileRefused, match="pairs-00000000.safetensors is damaged"):
        found.pair(1)
    shard.unlink()
    with pytest.raises(FileRefused, match="cannot be read any more"):
        found.pair(0)


def test_what_is_none_is_refused_in_words(tmp_path):
    with pytest.raises(FileRefused, match="holds no couplings"):
        couplings.read(tmp_path / "nowhere")
    couplings.create(tmp_path / "empty", IDENTITY, PROMPTS)
    with pytest.raises(FileRefused, match="no pairs yet"):
        couplings.read(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(
        FileRefused, match="folder of other files .cat.jpg.; choose another filename"
    ):
        make(tmp_path / "photos", 1, overwrite=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileRefused, match="cannot be made"):
        make(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="no prompts"):
        couplings.create(tmp_path / "b", IDENTITY, [])


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b'{"format": "nibble_caf_couplings"}',
        b'{"format": "other", "identity": {"shape": []}, "version": 1}',
    ],
)
def test_a_damaged_index_is_refused_and_overwrite_keeps_pairs_of_the_same_inputs(tmp_path, text):
    before = contents(make(tmp_path / "a", 2))
    (tmp_path / "a" / "couplings.json").write_bytes(text)
    for opened in (lambda: couplings.read(tmp_path / "a"), lambda: make(tmp_path / "a", 2)):
        with pytest.raises(FileRefused, match="couplings.json is damaged.*overwrite"):
            opened()
    again = couplings.create(tmp_path / "a", IDENTITY, PROMPTS, overwrite=True)
    assert contents(again) == before


def test_a_newer_format_and_lost_prompts_are_refused(tmp_path):
    make(tmp_path / "a", 1)
    found, index = couplings.read(tmp_path / "a"), tmp_path / "a" / "couplings.json"
    content = small.json_content(index.read_bytes())
    index.write_bytes(small.json_bytes(content | {"version": 2}))
    with pytest.raises(FileRefused, match="newer Nibble .version 2"):
        couplings.read(tmp_path / "a")
    found.captions.path.unlink()
    with pytest.raises(FileRefused, match="does not hold prompt 2 any more"):
        found.captions[1]


def test_lost_prompts_are_written_again(tmp_path):
    before = contents(make(tmp_path / "a", 1))
    couplings.read(tmp_path / "a").captions.path.unlink()
    with pytest.raises(FileRefused, match="captions-.* does not exist"):
        couplings.read(tmp_path / "a")
    make(tmp_path / "a", 1)
    assert contents(couplings.read(tmp_path / "a")) == before
    assert len(couplings.read(tmp_path / "a").captions[:]) == 2


def test_wrong_pairs_are_never_stored(tmp_path):
    found, good = make(tmp_path / "a", 1), torch.zeros(1, *SHAPE)
    for first, noise, data, captions, said in [
        (0, good, good, [0], "pair 0 is there already"),
        (1, good, good[..., :2], [0], "are not 1 latents"),
        (1, good, good / 0, [0], "not finite"),
        (1, good, good, [2], "a prompt that there is not"),
    ]:
        with pytest.raises(ValueError, match=said):
            found.add(first, noise, data, captions)
    assert len(found) == 1
    assert len(list((tmp_path / "a").glob("pairs-*"))) == 1


def test_a_full_disk_is_told_and_leaves_no_half_file(tmp_path, monkeypatch):
    found = make(tmp_path / "a", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileRefused, match="The disk of .* is full: pairs.*; free some space"):
            found.add(1, torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), [0])
    assert sorted(path.name for path in (tmp_path / "a").glob("pairs-*")) == [
        "pairs-00000000.safetensors"
    ]
    assert len(found) == 1


# ---- trees


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.builds(lambda n: torch.arange(float(n)).half(), st.integers(0, 3)),
    st.builds(torch.tensor, st.integers(-5, 5)),
)
TREES = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.dictionaries(st.text(max_size=4), part, max_size=3),
        st.tuples(part, part),
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a, b)
        )
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_comes_back_through_json(tree):
    tensors = []
    node = json.loads(json.dumps(conditioning_tree.encode(tree, tensors)))
    assert same(conditioning_tree.decode(node, lambda place: tensors[place]), tree)


class ControlNet:
    pass


@pytest.mark.parametrize(
    "extras, said",
    [
        ({"control": ControlNet()}, "prompt 2: control is a ControlNet"),
        ({"gligen": ("position", ControlNet(), [])}, "prompt 2: gligen is a ControlNet"),
        ({"hooks": {"group": ControlNet()}}, "prompt 2: hooks: group is a ControlNet"),
        ({3: 1}, "a key that is no text"),
        ({"mask": torch.zeros(2, dtype=torch.complex64)}, "mask is a tensor of torch.complex64"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_its_key(tmp_path, extras, said):
    with pytest.raises(ValueError, match=said):
        couplings.create(tmp_path / "a", IDENTITY, [PROMPTS[0], [torch.zeros(1), extras]])
    assert not (tmp_path / "a").exists()


def test_views_of_one_tensor_and_views_with_strides_are_kept(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    found = couplings.create(
        tmp_path / "a", IDENTITY, [[base.T, {"same": base[1:], "again": base[1:]}]]
    )
    tensor, extras = found.captions[0]
    assert torch.equal(tensor, base.T)
    assert torch.equal(extras["same"], base[1:])
    assert torch.equal(extras["again"], base[1:])
