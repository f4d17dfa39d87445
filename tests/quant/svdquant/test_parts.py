"""The parts of the decomposition against plain formulas: spaces, low rank in a metric, rounding,
GPTQ.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nibble.kernels import reference
from nibble.quant.svdquant.gptq import gptq, round_to_nearest, rounding_order
from nibble.quant.svdquant.grid import EvenGrid, loss
from nibble.quant.svdquant.lowrank_metric import Metric, parallel_sum, times_blocks
from nibble.quant.svdquant.smooth import InputSpace, smoothing_factors, smoothings, with_signs
from nibble.quant.weights.lowrank import svd_lowrank
from nibble.quant.weights.packing import dequantize_groups

ROOT = Path(__file__).resolve().parents[3]


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(x: torch.Tensor, size: int) -> torch.Tensor:
    parts = x.unflatten(1, (-1, size)).transpose(0, 1)
    return parts.mT @ parts / len(x)


SPACES = {"plain": {}, "rotated": {"rotation": 64}, "unsigned": {"act_unsigned": True}}


@pytest.mark.parametrize("options", SPACES.values(), ids=SPACES)
def test_a_space_changes_no_product_and_its_weight_map_inverts(options):
    x, weight = normal(5, 128), normal(7, 128, seed=1)
    space = InputSpace(normal(128, seed=2).exp().bfloat16().float(), **options)
    shift = reference.SHIFT if space.act_unsigned else 0
    torch.testing.assert_close(
        space.inputs(x) @ space.weight(weight).T, (x + shift) @ weight.T, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(space.raw_weight(space.weight(weight)), weight)


@pytest.mark.parametrize("options", SPACES.values(), ids=SPACES)
def test_its_four_bit_inputs_are_those_of_the_kernels(options):
    x, smooth = normal(9, 128), normal(128, seed=2).exp()
    space = InputSpace(smooth, **options)
    q, scale, _ = reference.quantize_down(x, smooth, torch.zeros(128, 1), **options)
    codes = reference.unpack_nibbles(q, not space.act_unsigned)
    torch.testing.assert_close(
        space.quantized(space.inputs(x)), dequantize_groups(codes, scale.T.contiguous().T)
    )


@pytest.mark.parametrize("rotation", [0, 64])
def test_moments_follow_the_inputs(rotation):
    x, space = normal(300, 256), InputSpace(normal(256, seed=2).exp(), rotation)
    torch.testing.assert_close(
        space.moments(blocks_of(x, 128)), blocks_of(space.inputs(x), 128), rtol=1e-3, atol=1e-4
    )


def test_smoothing_factors_are_exact_in_bf16_and_dead_channels_get_one():
    span_x, span_w = normal(128).abs(), normal(128, seed=1).abs()
    span_x[3] = span_w[9] = 0
    factors = smoothing_factors(span_x, span_w, 0.5, 0.5)
    assert torch.equal(factors, factors.bfloat16().float())
    assert factors[3] == factors[9] == 1
    assert (factors > 0).all()
    assert torch.equal(smoothing_factors(span_x * 0, span_w, 1, 0), torch.ones(128))
    extreme = smoothing_factors(torch.logspace(-30, 30, 128), torch.ones(128), 1, 0)
    assert extreme.isfinite().all()
    assert extreme.min() > 0


def test_the_grid_has_the_candidates_of_the_paper():
    labels = [label for label, _ in smoothings(normal(10, 64), normal(8, 64), 20)]
    assert len(labels) == len(set(labels)) == 1 + 2 * 38
    assert labels[0] == "none"


def test_signs_lower_the_peaks_that_a_fixed_rotation_meets():
    x = normal(200, 128) * 0.3 + 3  # a common mean: the plain Hadamard gathers it in one coordinate
    space = InputSpace(torch.ones(128), 64)
    signed = with_signs(space, x, torch.Generator().manual_seed(0))
    assert torch.equal(signed.smooth.abs(), space.smooth)

    def peak(s):
        return s.inputs(x).unflatten(1, (-1, 64)).abs().amax(-1).square().mean()

    assert peak(signed) < 0.2 * peak(space)
    plain = InputSpace(torch.ones(128))
    assert with_signs(plain, x, torch.Generator()) is plain


def test_randomized_svd_comes_close_to_the_exact_one():
    matrix = normal(96, 128) * torch.linspace(3, 0.01, 128)
    up, down = svd_lowrank(matrix, 16, torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(matrix)[16:].norm()
    assert (matrix - up @ down.T).norm() < 1.02 * exact


def test_a_start_from_a_close_matrix_is_worth_a_power():
    """One power from there does what two do from random numbers."""
    matrix = normal(256, 512)
    close = matrix + 0.3 * normal(256, 512, seed=1)
    start = svd_lowrank(close, 16, torch.Generator().manual_seed(1))[0]

    def error(**options):
        up, down = svd_lowrank(matrix, 16, torch.Generator().manual_seed(2), **options)
        return (matrix - up @ down.T).norm().item()

    assert error(start=start) < 1.001 * error(power=2) < error(power=1)


def test_ranks_above_the_matrix_are_filled_with_zeros():
    matrix = normal(8, 64)
    up, down = svd_lowrank(matrix, 16, torch.Generator().manual_seed(0))
    assert up.shape == (8, 16)
    assert down.shape == (64, 16)
    torch.testing.assert_close(up @ down.T, matrix, rtol=1e-4, atol=1e-4)


def test_scales_near_others_are_no_worse_than_those():
    w, importance = normal(4, 64, 50), normal(4, 64, 1, seed=1).square()
    grid = EvenGrid()
    near = grid.scales(w + 0.02 * normal(4, 64, 50, seed=2), importance)
    found = grid.scales_near(w, importance, near)
    before, after = (loss(grid, w, scale, importance) for scale in (near, found))
    assert (after <= before).all()
    assert after.sum() < before.sum()
    searched = loss(grid, w, grid.scales(w, importance), importance)
    assert after.sum() < 1.01 * searched.sum()
    plain = EvenGrid(search=False)
    assert torch.equal(plain.scales_near(w, importance, near), plain.scales(w, importance))


def test_the_fit_minimises_the_output_error_of_its_metric():
    x, weight = normal(400, 128) @ normal(128, 128, seed=3), normal(64, 128, seed=1)
    up, down = Metric(blocks_of(x, 128)).fit(weight, 16, torch.Generator().manual_seed(0))
    y = x @ weight.T
    optimum = torch.linalg.svdvals(y)[16:].square().sum()  # Eckart-Young on the outputs
    assert (y - x @ down @ up.T).square().sum() < 1.02 * optimum
    plain_up, plain_down = svd_lowrank(weight, 16, torch.Generator().manual_seed(0))
    assert (y - x @ down @ up.T).norm() < 0.9 * (y - x @ plain_down @ plain_up.T).norm()


def test_blocks_are_solved_rightly_whoever_has_set_the_threads():
    """In a process of its own, because the call that breaks torch's batched solver cannot be taken
    back.
    """
    code = f"""
import importlib.util, sys
root, init = {str(ROOT)!r}, {str(ROOT / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("nibble", init, submodule_search_locations=[root])
package = importlib.util.module_from_spec(spec)
sys.modules["nibble"] = package
spec.loader.exec_module(package)
import torch
from nibble.quant.svdquant.lowrank_metric import solve_blocks
torch.set_num_threads(2)
a = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
a = a @ a.mT / 256 + 0.1 * torch.eye(256)
assert (a @ solve_blocks(a, a) - a).norm() < 1e-3 * a.norm()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_parallel_sum_of_diagonals_is_elementwise():
    a, noise = normal(128).square() + 0.1, normal(128, seed=1).square() + 0.1
    got = parallel_sum(torch.diag_embed(a.reshape(2, 64)), noise).diagonal(dim1=1, dim2=2).flatten()
    torch.testing.assert_close(got, 1 / (1 / a + 1 / noise))


def test_blockwise_product_is_the_product_with_the_whole_matrix():
    blocks = normal(3, 64, 64)
    matrix = normal(5, 192, seed=1)
    torch.testing.assert_close(
        times_blocks(matrix, blocks), matrix @ torch.block_diag(*blocks), rtol=1e-4, atol=1e-4
    )


def test_searched_scales_beat_absmax_and_serve_either_sign_with_the_ninth_level():
    w, ones = normal(4, 64, 32), torch.ones(4, 64, 1)

    def error(search):
        scale = EvenGrid(search).scales(w, ones)
        assert torch.equal(scale, scale.bfloat16().float())
        return (w - EvenGrid().codes(w, scale) * scale).square().sum()

    assert error(True) < 0.85 * error(False)
    positive = torch.full((1, 64, 1), -7.0)
    positive[0, 0] = 8
    assert EvenGrid().scales(positive, torch.ones(1, 64, 1)) == -1


def test_a_group_of_zeros_has_scale_and_codes_zero():
    codes, scale = round_to_nearest(torch.zeros(3, 128), torch.ones(128), True)
    assert not codes.any()
    assert not scale.any()


def test_rounding_order_keeps_groups_together():
    diagonal = normal(2, 256).square()
    order = rounding_order(diagonal)
    assert torch.equal(order.sort(1).values, torch.arange(256).expand(2, 256))
    assert ((order // 64).unflatten(1, (4, 64)) == (order // 64)[:, ::64, None]).all()
    assert (diagonal.gather(1, order).unflatten(1, (4, 64)).diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("search", [False, True], ids=["absmax", "searched"])
def test_gptq_beats_rounding_to_nearest_in_the_metric_of_its_hessian(search):
    weight, x = normal(40, 256), normal(500, 256, seed=1) @ normal(256, 256, seed=2)
    hessian = blocks_of(x, 128) + 0.01 * torch.eye(128) * x.square().mean()

    def error(codes, scale):
        rest = weight - dequantize_groups(codes, scale)
        return (times_blocks(rest, hessian) * rest).sum()

    nearest = error(*round_to_nearest(weight, hessian.diagonal(dim1=1, dim2=2).flatten(), search))
    assert error(*gptq(weight, hessian, search)) < 0.75 * nearest


def test_gptq_with_a_diagonal_hessian_is_rounding_to_nearest():
    weight, diagonal = normal(40, 128), normal(128, seed=1).square() + 0.1
    codes, scale = gptq(weight, torch.diag_embed(diagonal.reshape(1, 128)), True)
    expected_codes, expected_scale = round_to_nearest(weight, diagonal, True)
    assert (codes == expected_codes).float().mean() > 0.999
    assert (scale == expected_scale).float().mean() > 0.99


def test_gptq_does_not_depend_on_how_rows_are_parted(monkeypatch):
    weight, hessian = normal(70, 128), blocks_of(normal(300, 128, seed=1), 128)
    whole = gptq(weight, hessian, True)
    monkeypatch.setattr("nibble.quant.svdquant.gptq._chunk", lambda *_: 16)
    parted = gptq(weight, hessian, True)
    assert (whole[0] == parted[0]).float().mean() > 0.999
    assert torch.allclose(whole[1], parted[1], rtol=0.01)
