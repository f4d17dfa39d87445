"""Integers under adapters: the same weights as the stored forms, bit for bit, and the way in and
out of their space.
"""

import numpy as np
import pytest
import torch

from intlora_bases import K, N, bases, normal, svdquant, w4a16
from nibble.kernels.reference import hadamard64
from nibble.quant.files.errors import FileRefused
from nibble.quant.merge.integer_grid import IntBase, refuse_format, rotate

every_base = pytest.mark.parametrize("kind", list(bases()))


def test_the_weight_is_the_stored_one():
    assert torch.equal(IntBase.of(w4a16()).weight(), w4a16().dequantize())
    for options in ({}, {"rotation": 64}, {"act_unsigned": True}):
        stored = svdquant(**options)
        base = IntBase.of(stored)
        torch.testing.assert_close(
            base.out_of(base.weight()), stored.residual(), rtol=1e-5, atol=1e-6
        )
    assert torch.equal(
        IntBase.of(svdquant()).out_of(IntBase.of(svdquant()).weight()), svdquant().residual()
    )


def test_rotation_is_the_reference_s_matrix_and_its_own_inverse():
    x = normal(3, 192).double()
    torch.testing.assert_close(rotate(x), hadamard64(x), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-14, atol=1e-15)


def test_rotation_has_one_order_of_sums():
    """Butterflies in plain numpy give the same float64 bits, so every device does."""
    x = normal(5, 64, seed=9).double() * 1e3
    rows = x.numpy().copy()
    for half in (1, 2, 4, 8, 16, 32):
        pairs = rows.reshape(-1, 2, half)
        rows = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
    assert np.array_equal(rotate(x).numpy(), rows.reshape(5, 64) * 0.125)


@every_base
def test_into_and_out_of_are_inverse_and_products_agree(kind):
    base, delta, x = bases()[kind], normal(N, K, seed=8).double(), normal(6, K, seed=9).double()
    torch.testing.assert_close(base.out_of(base.into(delta)), delta)
    torch.testing.assert_close(base.inputs(x) @ base.into(delta).T, x @ delta.T)


@every_base
def test_rows(kind):
    base = bases()[kind]
    assert torch.equal(base.rows(5, 20).weight(), base.weight()[5:20])
    assert torch.equal(base.rows(5, 20).integers(), base.integers()[5:20])
    assert base.rows(0, N).digest() == base.digest() != base.rows(0, N - 1).digest()


def test_digests_tell_bases_apart():
    made = {kind: base.digest() for kind, base in bases().items()}
    # the sign of the inputs is no matter of the integers
    assert made.pop("unsigned") == made["svdquant"]
    assert len(set(made.values())) == len(made)
    assert IntBase.of(svdquant()).digest() == IntBase.of(svdquant()).digest()


@pytest.mark.parametrize(
    "bits, group, odd, low, high",
    [
        (4, 64, False, 0.09, 0.13),
        (4, 0, False, 0.1, 0.14),
        (8, 0, False, 0.001, 0.01),
        (4, 64, True, 0.09, 0.13),
    ],
)
def test_rounding_errors_are_those_expected(bits, group, odd, low, high):
    weight = normal(64, 256, size=0.03)
    base = IntBase.from_weight(weight, bits, group, odd)
    assert low < (base.weight() - weight).norm() / weight.norm() < high
    z = base.integers()
    assert not odd or (z % 2 != 0).all()
    assert z.abs().max() <= 2 ** (bits if odd else bits - 1)


def test_zero_and_constant_rows_stay_finite():
    weight = torch.zeros(4, 64)
    weight[1], weight[2] = 0.5, -0.5
    base = IntBase.from_weight(weight)
    assert base.weight().isfinite().all()
    assert torch.equal(base.weight()[0], weight[0])
    torch.testing.assert_close(base.weight()[1:3], weight[1:3], rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "kind, named",
    [
        ("nf4", "NF4"),
        ("bnb_nf4", "NF4"),
        ("nvfp4", "NVFP4"),
        ("mxfp4", "MXFP4"),
        ("fp4", "FP4"),
        ("float8_e4m3fn", "fp8"),
        ("mxfp8", "MXFP8"),
        ("vq", "codewords of a codebook"),
        ("exl3", "'exl3'"),
    ],
)
def test_uneven_levels_are_refused_with_the_reason(kind, named):
    with pytest.raises(FileRefused, match=named) as refusal:
        refuse_format(kind, "blocks.0.proj", "flux.safetensors")
    text = str(refusal.value)
    assert "flux.safetensors" in text
    assert "blocks.0.proj" in text
    assert "SVDQuant Quantize Checkpoint" in text
    assert text.count(". ") == 0


def test_other_objects_are_refused_too():
    with pytest.raises(FileRefused, match="Parameter"):
        IntBase.of(torch.nn.Parameter(torch.zeros(4, 64)))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not divide"):
        IntBase(torch.zeros(4, 32, dtype=torch.int8), torch.ones(3, 4))
    with pytest.raises(ValueError, match="must divide K"):
        IntBase.from_weight(torch.zeros(4, 60), group=64)
    with pytest.raises(ValueError, match="rotation=64 does not fit"):
        IntBase(torch.zeros(4, 48, dtype=torch.int8), torch.ones(1, 4), rotation=64)
