"""Codebooks against scipy and brute force, and the published orderings on Gaussian weights."""

import math

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2, vq

from nibble.quant.vq4dit.codebook import (
    bits_per_weight,
    fitting_codewords,
    kmeans,
    logits,
    mix,
    nearest,
    smallest,
    sub_vectors,
    update,
)
from nibble.quant.vq4dit.fit import LayerOptions, fit
from nibble.quant.weights.packing import dequantize_groups, quantize_groups


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(count, size, seed=0):
    return torch.randn(count, size, generator=seeded(seed))


def distortion(vectors, codebook):
    return nearest(vectors, codebook)[1].mean().item()


def test_the_nearest_codeword_is_scipys():
    vectors, words = gaussian(3000, 4), gaussian(64, 4, 1)
    indices, distances = nearest(vectors, words)
    expected, apart = vq(vectors.numpy(), words.numpy())
    assert np.array_equal(indices[:, 0].numpy(), expected)
    assert torch.allclose(
        distances[:, 0], torch.from_numpy(apart).float() ** 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_are_those_of_brute_force_nearest_first(weighted):
    vectors, words = gaussian(500, 3), gaussian(32, 3, 1)
    weights = torch.rand(500, 3, generator=seeded(2)) + 0.1 if weighted else None
    indices, distances = nearest(vectors, words, 4, weights)
    full = ((vectors[:, None] - words) ** 2 * (1 if weights is None else weights[:, None])).sum(-1)
    best, order = full.sort(1)
    assert torch.equal(indices, order[:, :4])
    assert torch.allclose(distances, best[:, :4], rtol=1e-4, atol=1e-5)
    assert torch.equal(nearest(vectors, words, 1, weights)[0], indices[:, :1])


def test_the_smallest_distance_is_found_beside_its_index():
    values = torch.rand(200, 256, generator=seeded())
    index, best = smallest(values.clone())
    assert torch.equal(index, values.argmin(1))
    assert torch.allclose(best, values.amin(1), rtol=1e-4)
    assert smallest(torch.zeros(3, 16))[0].tolist() == [0, 0, 0]  # of equal ones the first


def test_one_iteration_is_scipys_and_the_whole_is_as_good():
    vectors = gaussian(4000, 2)
    start = vectors[:16].clone()
    ours = update(vectors, nearest(vectors, start)[0][:, 0], start)
    theirs, _ = kmeans2(vectors.numpy(), start.numpy(), iter=1, minit="matrix")
    assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)
    words, _ = kmeans2(vectors.numpy(), 16, iter=20, minit="++", seed=1)
    assert distortion(vectors, kmeans(vectors, 16, seeded())) < 1.05 * distortion(
        vectors, torch.from_numpy(words)
    )


def test_more_iterations_never_make_it_worse_and_equal_weights_change_nothing():
    vectors = gaussian(2000, 4)
    errors = [distortion(vectors, kmeans(vectors, 32, seeded(), iterations=i)) for i in range(6)]
    assert all(
        after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False)
    )
    assert errors[5] < 0.8 * errors[0]
    plain, weighted = (
        kmeans(vectors, 32, seeded()),
        kmeans(vectors, 32, seeded(), torch.ones_like(vectors)),
    )
    assert torch.allclose(plain, weighted, atol=1e-4)
    assert torch.equal(plain, kmeans(vectors, 32, seeded()))


def test_weights_move_codewords_to_what_counts():
    vectors = torch.cat(
        [
            torch.zeros(50, 1),
            torch.ones(50, 1),
            torch.full((50, 1), 10.0),
            torch.full((50, 1), 10.5),
        ]
    )
    counts = torch.cat([torch.full((100, 1), 100.0), torch.full((100, 1), 1e-3)])
    plain, weighted = (
        kmeans(vectors, 3, seeded(), weights).sort(0).values[:, 0] for weights in (None, counts)
    )
    assert torch.allclose(plain, torch.tensor([0.0, 1.0, 10.25])) or plain[0] == 0.5
    assert torch.allclose(weighted, torch.tensor([0.0, 1.0, 10.25]))


def test_a_codeword_that_nothing_is_near_moves():
    vectors = torch.cat(
        [torch.zeros(100, 2), torch.ones(1, 2), torch.full((1, 2), 5.0), torch.full((1, 2), 9.0)]
    )
    assert distortion(vectors, kmeans(vectors, 4, seeded())) == 0


def test_the_orderings_of_the_paper_on_gaussian_weights():
    """2 bits: round to nearest loses to pairs, pairs to triples, triples to fours; also with a
    scale a row, and at 3 bits.
    """
    weight = gaussian(384, 768)
    top = weight.abs().amax(1, keepdim=True)
    rounded = min(
        (
            (weight - (weight / (s := top * share / 1.5) - 0.5).round().clamp(-2, 1).add(0.5) * s)
            ** 2
        )
        .mean()
        .item()
        for share in torch.linspace(0.2, 1, 40)
    )

    def error(codewords, size):
        how = LayerOptions(codewords, size, scaled=False, rotation=0, turns=0)
        return (weight - fit(weight, None, None, how, seeded()).matrix()).square().mean().item()

    two = [error(16, 2), error(64, 3), error(256, 4)]
    assert rounded > 1.05 * two[0]
    assert two[0] > 1.05 * two[1]
    assert two[1] > 1.03 * two[2]
    assert two[2] == pytest.approx(0.096, abs=0.004)  # what fours leave of a Gaussian, as known
    three = quantize_groups(weight, (weight.unflatten(1, (-1, 64)).abs().amax(-1) / 3).T)
    assert (
        error(64, 2)
        < 0.9
        * (
            weight
            - dequantize_groups(
                three.clamp(-3, 3), (weight.unflatten(1, (-1, 64)).abs().amax(-1) / 3).T
            )
        )
        .square()
        .mean()
    )


def test_ratios_and_mixtures():
    vectors, words = gaussian(100, 3), gaussian(16, 3, 1)
    indices, distances = nearest(vectors, words, 3)
    ratios = logits(distances).softmax(-1)
    assert torch.allclose(ratios.sum(1), torch.ones(100))
    assert (ratios[:, :-1] >= ratios[:, 1:]).all()
    assert torch.equal(logits(distances, inverse=False), torch.zeros(100, 3))
    one = torch.nn.functional.one_hot(torch.full((100,), 2), 3).float()
    assert torch.equal(mix(words, indices, one), words[indices[:, 2]])
    words.requires_grad_(True)
    mix(words, indices, ratios).square().sum().backward()
    expected = torch.zeros_like(words)
    mixed = (words[indices] * ratios[..., None]).sum(1)
    for n in range(3):
        expected.index_add_(0, indices[:, n], (2 * mixed * ratios[:, n : n + 1]).detach())
    assert torch.allclose(words.grad, expected, atol=1e-4)


def test_ratios_start_in_inverse_proportion_to_euclidean_distances():
    """VQ4DiT's code: z_j = log(d_last / (d_j + 1e-5)) and 0 for the last, d = |v - c|."""
    vectors, words = gaussian(200, 3), gaussian(16, 3, 1)
    indices, squared = nearest(vectors, words, 2)
    euclidean = (vectors[:, None] - words[indices]).double().norm(dim=-1)
    z = torch.stack(
        [(euclidean[:, 1] / (euclidean[:, 0] + 1e-5)).log(), torch.zeros(200).double()], 1
    )
    found = logits(squared).softmax(-1)
    assert torch.allclose(found.double(), z.softmax(-1), atol=1e-4)
    by_hand = logits(torch.tensor([[1.0, 9.0]])).softmax(-1)  # distances 1 and 3: 3 to 1
    assert torch.allclose(by_hand, torch.tensor([[0.75, 0.25]]), atol=1e-5)


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**-8, 2.0**10])
def test_the_start_of_the_ratios_does_not_depend_on_the_unit_of_the_weights(unit):
    vectors, words = gaussian(100, 3), gaussian(16, 3, 1)
    vectors[0] = words[3]  # hit exactly
    _, plain = nearest(vectors, words, 3)
    plain[0, 0] = 0.0
    assert torch.equal(logits(plain * unit**2), logits(plain))
    assert logits(plain)[0].softmax(-1)[0] > 0.9999
    assert torch.equal(logits(torch.zeros(1, 2)).softmax(-1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("codewords", "size", "bits"),
    [(256, 4, 2.0), (64, 2, 3.0), (256, 2, 4.0), (16, 2, 2.0), (4096, 4, 3.0)],
)
def test_bits_a_weight(codewords, size, bits):
    n, k = 3072, 3072
    exact = bits_per_weight(codewords, size, (n, k))
    assert bits < exact < bits + 0.09
    assert exact == pytest.approx(
        math.log2(codewords) / size + 16 * codewords * size / (n * k) + 16 / k
    )


def test_small_layers_get_fewer_codewords():
    assert fitting_codewords(256, 4, (3072, 3072)) == 256
    assert fitting_codewords(256, 4, (16, 64)) == 64  # four sub-vectors each
    # 6 indices of 6 bits fill no whole bytes, of 4 they do
    assert fitting_codewords(64, 3, (64, 96)) == 64
    assert fitting_codewords(64, 2, (64, 12)) == 16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="K=100 is not a multiple of the sub-vector length 3"):
        sub_vectors(torch.zeros(4, 100), 3)
    with pytest.raises(ValueError, match="10 sub-vectors are too few for 16 codewords"):
        kmeans(gaussian(10, 2), 16, seeded())
