"""The adapter file: everything comes back, it is small, and what cannot be used is refused in one
sentence that names file and fix.
"""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from intlora_bases import K, N, adapters, bases, factors, paper
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import read_header
from nibble.quant.intlora import file
from nibble.quant.intlora.adapter import Adapter, LayerAdapter
from nibble.quant.intlora.merge import merge
from nibble.quant.intlora.variants import ShiftAdd


def everything() -> tuple[Adapter, dict]:
    """Each variant, with and without R, low rank and dense, whole layers and rows; and the bases
    that they are for.
    """
    plain = bases()["int4"]
    layers = {f"plain.{name}": use for name, use in adapters(plain).items()}
    known = dict.fromkeys(layers, plain)
    for variant in ("mul", "shift"):
        known[f"paper.{variant}"], layers[f"paper.{variant}"], _ = paper(variant)
    known["fused"] = bases()["rotated"]
    for rows in ((0, 16), (16, 48)):
        part = known["fused"].rows(*rows)
        layers[f"fused@{rows[0]}-{rows[1]}"] = LayerAdapter(
            ShiftAdd(7), part.digest(), factors(*part.shape, dtype=torch.int16), rows=rows
        )
    known["dense"] = bases()["w4a16"]
    layers["dense"] = LayerAdapter(
        ShiftAdd(5),
        known["dense"].digest(),
        dense=torch.arange(N * K).remainder(199).sub(99).reshape(N, K).to(torch.int8),
    )
    return Adapter(layers, {"steps": 7}), known


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "style.safetensors"
    file.save(everything()[0], path)
    return path


def rewrite(path, metadata=None, tensors=None):
    """The file with other metadata (None removes an entry) or tensors; checksums are those of the
    new tensors unless given, and there is none of the header, as in files of earlier versions.
    """
    from nibble.quant.files.safetensors import checksum

    held, old = load_file(path), dict(read_header(path).metadata)
    del old["header_checksum"]
    held |= tensors or {}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    old["checksums"] = json.dumps({name: checksum(tensor) for name, tensor in held.items()})
    old |= metadata or {}
    save_file(held, path, {key: value for key, value in old.items() if value is not None})
    return path


def layers_of(path) -> dict:
    return json.loads(read_header(path).metadata["layers"])


def test_everything_comes_back_bit_for_bit(saved):
    before, known = everything()
    after = file.read(saved)
    assert after.facts == {"steps": 7}
    assert after.layers.keys() == before.layers.keys()
    file.check_bases(after, known, saved.name)
    for key, use in before.layers.items():
        base = known[key.partition("@")[0]]
        assert after.layers[key].rows == use.rows
        assert after.layers[key].base == use.base
        assert torch.equal(
            merge(base, [(after.layers[key], 1.0)]).base.weight(),
            merge(base, [(use, 1.0)]).base.weight(),
        )


def test_the_file_says_what_it_is_and_is_small(saved):
    header = read_header(saved)
    assert header.metadata["format"] == "intlora"
    assert layers_of(saved)["paper.mul"]["seed"] == 3
    assert layers_of(saved)["plain.shift_add"] == {
        "variant": "shift_add",
        "base": bases()["int4"].digest(),
        "rank": 4,
        "k": 6,
    }
    # no R, no U
    assert not any(
        info.shape == (N, K) for name, info in header.tensors.items() if name != "dense.delta"
    )
    use = everything()[0].layers["plain.shift_add"]
    assert use.nbytes == 4 * (N + K) + 2 * (N + K)
    assert saved.stat().st_size < 1.5 * everything()[0].nbytes + 12000


def test_saving_twice_replaces_and_other_files_are_left_alone(saved, tmp_path):
    one = Adapter({"a": everything()[0].layers["dense"]})
    file.save(one, saved)
    assert file.read(saved).layers.keys() == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == [saved.name]
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileRefused, match="other.safetensors exists"):
        file.save(one, tmp_path / "other.safetensors")
    with pytest.raises(FileRefused, match="would hold no layer"):
        file.save(Adapter({}), tmp_path / "new.safetensors")


def refused(path, *words):
    with pytest.raises(FileRefused) as refusal:
        file.read(path)
    text = str(refusal.value)
    assert path.name in text, text
    assert text.endswith("."), text
    assert all(word in text for word in words), text


def test_what_is_no_adapter_is_refused(saved, tmp_path):
    save_file({"blocks.0.lora_up.weight": torch.zeros(4, 2)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "ordinary LoRA", "Convert LoRA to IntLoRA")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "no IntLoRA adapter")
    refused(tmp_path / "missing.safetensors", "does not exist")


@pytest.mark.parametrize("version", ["3", "x", "", "-1", "0"])
def test_other_versions_are_refused(saved, version):
    refused(rewrite(saved, {"intlora_version": version}), "update Nibble")


def test_every_cut_is_refused(saved):
    whole = saved.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved)


def test_a_flipped_bit_is_found(saved):
    whole = bytearray(saved.read_bytes())
    whole[-3] ^= 4
    saved.write_bytes(whole)
    refused(saved, "checksum", "copy it again")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"plain.mul.u_scale": torch.ones(3)}, "u_scale"),
        ({"plain.mul.u_zero": None}, "u_zero"),
        ({"plain.mul.lora_A": None}, "lora_A"),
        ({"plain.mul.lora_B": torch.zeros(N, 3, dtype=torch.int8)}, "fit"),
        ({"plain.mul.lora_B": torch.zeros(N, 4)}, "differ"),
        ({"plain.mul.lora_A_scale": torch.ones(K)}, "differ"),
        ({"paper.mul.r_scale": torch.ones(N, 1)}, "r_scale"),
        ({"dense.delta": torch.zeros(N, K)}, "delta"),
        ({"plain.mul.u_scale": torch.full((N,), float("nan"))}, "finite"),
    ],
)
def test_wrong_tensors_are_refused(saved, change, word):
    refused(rewrite(saved, tensors=change), word)


@pytest.mark.parametrize(
    "key, facts, word",
    [
        ("plain.shift_add", {"k": 99}, "k is 99"),
        ("plain.shift_add", {"k": "6"}, "k is 6"),
        ("plain.shift_add", {"variant": "rotate"}, "unknown variant"),
        ("plain.shift_add", {"sparkle": 1}, "sparkle"),
        ("plain.shift_add", {"rank": 9}, "rank 4, not 9"),
        ("plain.shift_add", {"base": None}, "which base"),
        ("plain.mul", {"bits": 40}, "bits"),
        ("plain.shift", {"window": 99}, "window"),
        ("paper.mul", {"seed": None}, "seed"),
        ("dense", {"k": None}, "k is None"),
    ],
)
def test_wrong_facts_are_refused(saved, key, facts, word):
    layers = layers_of(saved)
    layers[key] |= facts
    refused(rewrite(saved, {"layers": json.dumps(layers)}), word)


@pytest.mark.parametrize(
    "metadata",
    [
        {"layers": "{"},
        {"layers": None},
        {"layers": "{}"},
        {"layers": "[1]"},
        {"facts": "]"},
        {"checksums": None},
    ],
)
def test_damaged_metadata_is_refused(saved, metadata):
    refused(rewrite(saved, metadata), "damaged metadata")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
def test_fuzzed_bytes_are_read_as_before_or_refused(saved, place, junk):
    whole = bytearray(saved.read_bytes()) if not hasattr(saved, "kept") else None
    original = bytes(whole)
    start = place % len(whole)
    whole[start : start + len(junk)] = junk[: len(whole) - start]
    damaged = saved.with_name("damaged.safetensors")
    damaged.write_bytes(whole)
    try:
        file.read(damaged)  # a change inside a name or a fact may leave a valid file
    except FileRefused as refusal:
        assert "damaged.safetensors" in str(refusal)
    assert saved.read_bytes() == original


# ---- against a model -----------------------------------------------------------------------------


def against(known, *words, adapter=None):
    with pytest.raises(FileRefused) as refusal:
        file.check_bases(adapter or everything()[0], known, "style.safetensors", "flux.safetensors")
    text = str(refusal.value)
    assert "style.safetensors" in text, text
    assert "flux.safetensors" in text, text
    assert text.endswith("."), text
    assert all(word in text for word in words), text


def test_other_models_are_refused():
    _, known = everything()
    against({"something.else": known["dense"]}, "fits no layer", "choose the model")
    against({name: base for name, base in known.items() if name != "dense"}, "dense", "lacks")
    against(known | {"dense": bases()["int4"]}, "another 4-bit file", "dense")
    against(known | {"dense": bases()["int4"].rows(0, 16)}, "48 x 128", "16 x 128")
    other = replace(known["fused"], scale=known["fused"].scale * 2)
    against(known | {"fused": other}, "fused@0-16 has other integers")
