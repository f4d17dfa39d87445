"""The CPU's 4-bit product against the matrix that it stands for."""

import pytest
import torch

from nibble.quant.modulation.cpu_int4 import CpuInt4Matrix
from nibble.quant.weights.awq_w4a16 import W4A16Weight


def weight(n, k, zeros, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scale = (torch.rand(k // 64, n, generator=draw) + 0.5).bfloat16()
    offsets = torch.randn(k // 64, n, generator=draw).bfloat16() if zeros else None
    return W4A16Weight(
        torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8),
        scale,
        offsets,
        torch.randn(n, generator=draw).bfloat16(),
    )


@pytest.mark.parametrize("n, k, zeros", [(16, 64, False), (768, 256, True), (48, 320, True)])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3, 5)], ids=str)
def test_it_is_the_product_with_the_matrix(n, k, zeros, shape):
    w, x = weight(n, k, zeros), torch.randn(*shape, k)
    expected = torch.nn.functional.linear(x.double(), w.dequantize().double(), w.bias.double())
    y = CpuInt4Matrix(w).product(x, w.bias)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert (y - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_16_bit_products_are_as_exact_as_their_results(dtype, error):
    w, x = weight(64, 128, True), torch.randn(2, 128).to(dtype)
    exact = torch.nn.functional.linear(x.double(), w.dequantize().double(), w.bias.double())
    y = CpuInt4Matrix(w, dtype).product(x, w.bias)
    assert y.dtype == dtype
    assert (y - exact).norm() < error * exact.norm()


def test_what_torch_cannot_pack_is_said():
    assert not CpuInt4Matrix.supports(weight(37, 64, False))
    with pytest.raises(ValueError, match="37 outputs"):
        CpuInt4Matrix(weight(37, 64, False))


def test_its_size_is_that_of_codes_and_float32_scales():
    assert CpuInt4Matrix(weight(64, 128, False)).nbytes == 64 * 64 + 2 * 2 * 64 * 4
