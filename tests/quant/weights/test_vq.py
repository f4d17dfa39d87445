"""A layer of codewords as tensors, as a file's part, and as a module."""

import pytest
import torch

from nibble.kernels.reference import hadamard64
from nibble.quant.vq4dit.codebook import bits_per_weight
from nibble.quant.weights.base import json_tensor
from nibble.quant.weights.modules import as_module
from nibble.quant.weights.packing import pack_indices
from nibble.quant.weights.vq import VQLinear, VQWeight


def make(n=32, k=128, codewords=64, size=2, rotation=0, rank=0, scaled=True, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    codes = torch.randint(codewords, (n, k // size), generator=generator)
    return (
        VQWeight(
            pack_indices(codes, codewords.bit_length() - 1),
            normal(codewords, size).half(),
            normal(n).half() if scaled else None,
            normal(k, rank).bfloat16() if rank else None,
            normal(n, rank).bfloat16() if rank else None,
            normal(n).bfloat16() if bias else None,
            rotation,
        ),
        codes,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotation": 64},
        {"rank": 16},
        {"scaled": False, "bias": False},
        {"codewords": 256, "size": 4},
        {"codewords": 4096, "size": 4},
    ],
    ids=str,
)
def test_it_stands_for_its_matrix_and_survives_a_file(options):
    weight, codes = make(**options)
    matrix = weight.codebook.float()[codes].reshape(32, 128)
    matrix = matrix if weight.scale is None else matrix * weight.scale.float()[:, None]
    matrix = hadamard64(matrix) if weight.rotation else matrix
    matrix = (
        matrix if not weight.rank else matrix + weight.proj_up.float() @ weight.proj_down.float().T
    )
    assert torch.allclose(weight.dequantize(), matrix, atol=1e-5)
    assert torch.equal(weight.codes().long(), codes)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        weight.forward(x),
        torch.nn.functional.linear(x, matrix, weight.effective_bias()),
        rtol=1e-3,
        atol=1e-2,
    )
    again = VQWeight.from_tensors(weight.tensors("a.b"), "a.b")
    assert again.facts() == weight.facts()
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.shape == (32, 128)


def test_its_bytes_are_those_of_the_formula():
    for codewords, size in ((256, 4), (64, 2), (256, 2), (16, 2)):
        weight, _ = make(256, 512, codewords, size)
        assert weight.bits_per_weight == pytest.approx(bits_per_weight(codewords, size, (256, 512)))
        assert weight.nbytes == sum(
            tensor.nbytes
            for name, tensor in weight.tensors("x").items()
            if not name.endswith("comfy_quant")
        )
    assert make(256, 512, rank=16)[0].bits_per_weight == pytest.approx(
        bits_per_weight(64, 2, (256, 512), rank=16)
    )


def test_rows_are_cut_and_joined():
    weight, _ = make(rank=16)
    pieces = [weight.rows(0, 8), weight.rows(8, 32)]
    assert torch.equal(pieces[1].dequantize(), weight.dequantize()[8:])
    joined = VQWeight.cat(pieces)
    assert all(
        torch.equal(a, b)
        for a, b in zip(joined.tensors("x").values(), weight.tensors("x").values(), strict=True)
    )
    other, _ = make(rank=16, seed=5)
    with pytest.raises(ValueError, match="one codebook"):
        VQWeight.cat([pieces[0], other])


def test_the_module_computes_the_same_and_its_state_is_the_files(tmp_path):
    weight, _ = make(rotation=64)
    module, x = as_module(weight), torch.randn(2, 128)
    assert torch.equal(module(x), weight.forward(x))
    assert set(module.state_dict()) == {
        "weight",
        "weight_codebook",
        "weight_scale",
        "bias",
        "comfy_quant",
    }
    fresh = as_module(make(rotation=64, seed=3)[0])
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))
    assert "codewords=64" in repr(module)
    assert {name for name, _ in VQLinear(weight, train=True).named_parameters()} == {
        "weight_codebook",
        "weight_scale",
        "bias",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codebook": torch.zeros(63, 2).half()}, "power of two"),
        (
            {"codebook": torch.zeros(64).half().reshape(64)[None][0]},
            "power of two|tuple index|codebook",
        ),
        ({"indices": torch.zeros(32, 48, dtype=torch.int8)}, "uint8"),
        ({"indices": torch.zeros(32, 47, dtype=torch.uint8)}, "no rows of 6-bit"),
        ({"scale": torch.ones(31)}, "scale has the shape"),
        ({"proj_down": torch.ones(128, 16)}, "both proj_down and proj_up"),
        ({"rotation": 32}, "rotation=32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    weight, _ = make()
    with pytest.raises(ValueError, match=words):
        VQWeight(
            **{"indices": weight.indices, "codebook": weight.codebook, "scale": weight.scale}
            | change
        )


def test_a_layers_json_must_tell_the_truth():
    stored = make()[0].tensors("a")
    for facts, words in (
        ({"format": "vq", "codewords": 256, "vector": 2}, "its tensors are those of"),
        ({"format": "vq", "codewords": 64, "vector": 2, "sparkle": 1}, "sparkle"),
        ({"format": "awq_w4a16"}, "'vq' was expected"),
    ):
        with pytest.raises(ValueError, match=words):
            VQWeight.from_tensors(stored | {"a.comfy_quant": json_tensor(facts)}, "a")
    del stored["a.weight_codebook"]
    with pytest.raises(ValueError, match="a lacks weight_codebook"):
        VQWeight.from_tensors(stored, "a")
