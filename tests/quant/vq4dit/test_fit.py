"""One layer in closed form: feedback against the nearest codeword, scales, and input that cannot be
used.
"""

import pytest
import torch

from nibble.kernels.reference import hadamard64
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.vq4dit import gptq as feedback
from nibble.quant.vq4dit.codebook import kmeans, nearest, sub_vectors
from nibble.quant.vq4dit.fit import Fitted, LayerOptions, fit, moments, sample_rows, sqnr

N, K = 96, 128


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(seed=0):
    return torch.randn(N, K, generator=seeded(seed)) * 0.05


def recorded(k=K, rank=24, seed=1, bias=0.5):
    """Inputs of a few directions over a little noise, with a mean."""
    stats = InputStats.empty(k)
    factors = torch.randn(rank, k, generator=seeded(seed))
    stats.update(
        torch.randn(2000, rank, generator=seeded(seed + 1)) @ factors
        + 0.3 * torch.randn(2000, k, generator=seeded(seed + 2))
        + bias
    )
    return stats


def test_with_white_inputs_feedback_is_the_nearest_codeword():
    w = weight()
    words = kmeans(sub_vectors(w, 4), 64, seeded())
    codes = feedback.assign(w, torch.eye(K)[None], words)
    assert torch.equal(codes.flatten(), nearest(sub_vectors(w, 4), words)[0][:, 0])


def test_on_correlated_inputs_feedback_beats_the_nearest_codeword():
    w, hessian = weight(), moments(recorded(), K, False, 0, torch.device("cpu"))
    words = kmeans(sub_vectors(w, 4), 64, seeded())

    def error(codes):
        return feedback.output_error(w - words[codes].reshape(N, K), hessian)

    near = nearest(sub_vectors(w, 4), words)[0].reshape(N, -1)
    assert error(feedback.assign(w, hessian, words)) < 0.5 * error(near)


def test_one_sub_vector_is_chosen_exactly():
    """With a single sub-vector nothing is left to make up for: the choice is the best in the metric
    H, by brute force.
    """
    x = torch.randn(500, 4, generator=seeded()) @ torch.randn(4, 4, generator=seeded(1))
    hessian = torch.block_diag(*[x.T @ x / 500] * 16)[None]
    w, words = torch.randn(8, 64, generator=seeded(2)), torch.randn(16, 4, generator=seeded(3))
    gaps = w.reshape(8, 16, 1, 4) - words
    best = torch.einsum("njce,ef,njcf->njc", gaps, hessian[0, :4, :4], gaps).argmin(-1)
    assert torch.equal(feedback.assign(w, hessian, words), best)


def test_the_best_codebook_and_scales_solve_their_normal_equations():
    w, hessian = weight(), moments(recorded(), K, False, 0, torch.device("cpu"))
    scale = torch.rand(N, generator=seeded(5)) + 0.5
    words = kmeans(sub_vectors(w, 4), 16, seeded())
    codes = nearest(sub_vectors(w / scale[:, None], 4), words)[0].reshape(N, -1)

    def error(book, scales=scale):
        return feedback.output_error(w - book[codes].reshape(N, K) * scales[:, None], hessian)

    best = feedback.best_codebook(w, codes, words, scale, hessian, steps=80).requires_grad_(True)
    difference = w - best.index_select(0, codes.flatten()).reshape(N, K) * scale[:, None]
    (slope,) = torch.autograd.grad((feedback.times(difference, hessian) * difference).sum(), best)
    assert error(best.detach()) < 0.95 * error(words)
    assert slope.abs().max() < 1e-2 * error(words)
    scales = feedback.best_scale(w, words[codes].reshape(N, K), hessian)
    assert error(words, scales) <= error(words)
    assert error(words, scales * 1.01) > error(words, scales) < error(words, scales * 0.99)


def test_rows_of_different_size_want_a_scale():
    spread = torch.randn(N, 1, generator=seeded(7)).exp()
    w = weight() * spread
    plain, scaled = (
        fit(w, None, None, LayerOptions(256, 4, scaled=scaled, rotation=0, turns=0), seeded())
        for scaled in (False, True)
    )
    share = [(((w - fitted.matrix()) / spread) ** 2).mean() for fitted in (plain, scaled)]
    assert share[1] < 0.6 * share[0]
    assert scaled.scale.median() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rotation", [0, 64])
def test_each_step_of_the_ladder_is_closer_than_the_one_before(rotation):
    w, bias, stats = weight(), torch.randn(N, generator=seeded(9)), recorded()
    rows = sample_rows(stats, K, seeded())

    def db(how, given):
        return sqnr(w, bias, fit(w, bias, given, how, seeded()).pack(torch.float32), rows)

    plain = db(LayerOptions(64, 4, scaled=True, rotation=rotation, turns=0), None)
    weighted = db(LayerOptions(64, 4, scaled=True, rotation=rotation, turns=0), stats)
    guided = db(LayerOptions(64, 4, scaled=True, rotation=rotation, turns=2), stats)
    assert plain < weighted
    assert weighted + 3 < guided


def test_the_bias_takes_up_the_mean_of_the_error():
    w, stats = weight(), recorded(bias=2.0)
    fitted = fit(w, torch.zeros(N), stats, LayerOptions(16, 2, rotation=64), seeded())
    error = (w - hadamard64(fitted.matrix())) @ stats.mean
    assert torch.allclose(fitted.bias, error, atol=1e-4)
    assert error.abs().max() > 0.01


def test_rows_of_zeros_stay_zeros_and_packing_loses_nothing():
    w = weight()
    w[3] = 0
    fitted = fit(w, None, None, LayerOptions(64, 2, rotation=0), seeded())
    packed = fitted.pack()
    assert not packed.dequantize()[3].any()
    assert torch.equal(packed.dequantize(), fitted.matrix())
    again = Fitted.unpack(packed)
    assert torch.equal(again.codes, fitted.codes)
    assert torch.equal(again.codebook, fitted.codebook)
    assert torch.equal(again.scale, fitted.scale)
    zeros = fit(torch.zeros(N, K), None, None, LayerOptions(64, 2, rotation=0), seeded())
    assert not zeros.matrix().any()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda: (torch.full((N, K), torch.nan), None, None), "NaN or infinity"),
        (lambda: (weight(), torch.zeros(N + 1), None), "a bias of shape"),
        (lambda: (weight(), None, recorded(64)), "statistics of 64 inputs"),
        (lambda: (weight() * 1e7, None, None), "too large for a codebook in fp16"),
        (
            lambda: (weight()[:, :126], None, None),
            "K=126 is not a multiple of the sub-vector length 4",
        ),
    ],
)
def test_input_that_cannot_be_used_is_named(spoil, words):
    with pytest.raises(ValueError, match=words):
        fit(*spoil(), LayerOptions(64, 4, rotation=0), seeded())
