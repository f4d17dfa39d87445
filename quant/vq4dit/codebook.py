"""Codebooks of sub-vectors: k-means, the nearest candidates of each sub-vector and their ratios,
and what it all takes on disk.

    distance   d(v, c) = sum_e w[v, e] (v[e] - c[e])^2                          w = 1: plain k-means
    seeding    k-means++ (Arthur, Vassilvitskii, 2007): the next codeword is drawn in proportion to
      the distance from those there are
    candidates the n nearest codewords (VQ4DiT, Deng et al., 2024, arXiv:2408.17131, eq. 5), mixed
    by r = softmax(z) (eq. 6)
    size       log2(C) / D bits a weight, 16 C D bits for the codebook in fp16, 16 bits a row where
      rows have a scale

A sub-vector is D neighbouring weights of a row: W (N, K) is (N K/D, D) of them.
"""

import math

import torch
from torch import Tensor

# sub-vectors that a codebook is fitted on, at most: 256 a codeword at C = 256
SAMPLE = 1 << 16
SEEDED = 32  # sub-vectors a codeword that k-means++ looks at
ITERATIONS = 20
_CACHED = 1 << 18  # distances held at once on a CPU: 1 MiB
_SPARED = 1 << 26  # … on a GPU
# added to a distance, as a share of the last candidate's, so that a codeword that is hit exactly
# has a finite ratio; VQ4DiT's code adds 1e-5 itself, which depends on the unit of the weights
_TOUCH = 1e-5


def sub_vectors(weight: Tensor, size: int) -> Tensor:
    """W (N, K) → (N * K/D, D). Raises ValueError unless D divides K."""
    if weight.shape[1] % size:
        raise ValueError(f"K={weight.shape[1]} is not a multiple of the sub-vector length {size}")
    return weight.reshape(-1, size)


def bits_per_weight(
    codewords: int, size: int, shape: tuple[int, int], scaled: bool = True, rank: int = 0
) -> float:
    """Bits a weight of an N x K linear, all told but the bias: indices, codebook, row scales,
    low-rank branch (all in 16 bit).
    """
    n, k = shape
    return math.log2(codewords) / size + 16 * (codewords * size + n * scaled + rank * (n + k)) / (
        n * k
    )


def fitting_codewords(codewords: int, size: int, shape: tuple[int, int]) -> int:
    """Codewords for a layer: halved until each has four sub-vectors at least, as VQ4DiT does, and a
    row fills whole bytes.
    """
    n, k = shape
    while codewords > 2 and (
        codewords > n * k // size // 4 or k // size * (codewords.bit_length() - 1) % 8
    ):
        codewords //= 2
    return codewords


def _parts(count: int, codewords: int, device: torch.device) -> range:
    step = max(64, (_CACHED if device.type == "cpu" else _SPARED) // codewords)
    return range(0, count, step)


def _distances(vectors: Tensor, codebook: Tensor, weights: Tensor | None) -> Tensor:
    """(V, D), (C, D), (V, D) | None → distances (V, C) in one product, a little below zero at
    worst.
    """
    square, ones = codebook.square(), codebook.new_ones(len(codebook), 1)
    if weights is None:
        left = torch.cat(
            [vectors, vectors.new_ones(len(vectors), 1), vectors.square().sum(1, keepdim=True)], 1
        )
        right = torch.cat([codebook * -2, square.sum(1, keepdim=True), ones], 1)
    else:
        weighted = vectors * weights
        left = torch.cat([weighted, weights, (weighted * vectors).sum(1, keepdim=True)], 1)
        right = torch.cat([codebook * -2, square, ones], 1)
    return left @ right.T


def smallest(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 and value of the least of the last axis of float32 distances (…, C), which are
    overwritten.

    The index rides in the lowest log2(C) bits of the distance, as floats from zero up are ordered
    as their bits are: one vectorized minimum is measured to be three times as fast on a CPU as
    torch's search for an index. Distances equal to 2^(log2(C) - 23) tie; the first counts.
    """
    count = distances.shape[-1]
    if distances.device.type != "cpu" or count > 1024:
        best, index = distances.min(-1)
        return index, best.clamp_min(0)
    mask = (1 << (count - 1).bit_length()) - 1
    bits = (
        distances.clamp_min_(0)
        .view(torch.int32)
        .bitwise_and_(~mask)
        .bitwise_or_(torch.arange(count, dtype=torch.int32))
    )
    best = bits.amin(-1)
    return (best & mask).long(), (best & ~mask).view(torch.float32)


def nearest(
    vectors: Tensor, codebook: Tensor, count: int = 1, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` nearest codewords of each vector, nearest first: indices int64 (V, count),
    distances (those of `d` above: squares) float32 (V, count).

    Shapes: vectors (V, D) · codebook (C, D) · weights (V, D) | None
    """
    indices = torch.empty(len(vectors), count, dtype=torch.int64, device=vectors.device)
    distances = torch.empty(len(vectors), count, device=vectors.device)
    parts = _parts(len(vectors), len(codebook), vectors.device)
    step = parts.step
    for start in parts:
        rows = slice(start, start + step)
        scores = _distances(vectors[rows], codebook, None if weights is None else weights[rows])
        if count == 1:
            indices[rows, 0], distances[rows, 0] = smallest(scores)
        else:
            distances[rows], indices[rows] = scores.clamp_min_(0).topk(
                count, largest=False, sorted=True
            )
    return indices, distances


def _seed(
    vectors: Tensor, codewords: int, weights: Tensor | None, generator: torch.Generator
) -> Tensor:
    """k-means++ on a part of the vectors; draws on the CPU in float64, so that every device draws
    alike.
    """
    if len(vectors) > SEEDED * codewords:
        chosen = torch.randperm(len(vectors), generator=generator)[: SEEDED * codewords].to(
            vectors.device
        )
        vectors, weights = vectors[chosen], None if weights is None else weights[chosen]
    picked = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = torch.full((len(vectors),), torch.inf, device=vectors.device)
    while True:
        difference = (vectors - vectors[picked[-1]]).square_()
        torch.minimum(
            distance,
            (difference if weights is None else difference.mul_(weights)).sum(1),
            out=distance,
        )
        if len(picked) == codewords:
            return vectors[picked].clone()
        total = distance.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        picked.append(min(int(torch.searchsorted(total, draw)), len(vectors) - 1))


def update(
    vectors: Tensor, indices: Tensor, codebook: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Each codeword becomes the (weighted) mean of its vectors; one without vectors stays. (V, D),
    (V,), (C, D), (V, D) | None → (C, D).
    """
    weigh = torch.ones_like(vectors) if weights is None else weights
    total = torch.zeros_like(codebook).index_add_(0, indices, vectors * weigh)
    mass = torch.zeros_like(codebook).index_add_(0, indices, weigh.expand_as(vectors).contiguous())
    return torch.where(mass > 0, total / mass.clamp_min(1e-30), codebook)


def kmeans(
    vectors: Tensor,
    codewords: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    iterations: int = ITERATIONS,
    sample: int = SAMPLE,
) -> Tensor:
    """A codebook float32 (C, D) for vectors (V, D): k-means++ and Lloyd's iterations on at most
    `sample` of them.

    weights   (V, D), how much each weight's squared error counts | None
    generator a CPU one
    A codeword that nothing is nearest to moves to the vector that is worst off. Raises ValueError
    for fewer vectors than codewords.
    """
    if len(vectors) < codewords:
        raise ValueError(f"{len(vectors)} sub-vectors are too few for {codewords} codewords")
    if len(vectors) > sample:
        chosen = torch.randperm(len(vectors), generator=generator)[:sample].to(vectors.device)
        vectors, weights = vectors[chosen], None if weights is None else weights[chosen]
    vectors = vectors.float()
    codebook = _seed(vectors, codewords, weights, generator)
    for _ in range(iterations):
        indices, distance = nearest(vectors, codebook, 1, weights)
        fresh = update(vectors, indices[:, 0], codebook, weights)
        empty = (torch.bincount(indices[:, 0], minlength=codewords) == 0).nonzero()[:, 0]
        if len(empty):
            fresh[empty] = vectors[distance[:, 0].topk(len(empty)).indices]
        if torch.equal(fresh, codebook):
            break
        codebook = fresh
    return codebook


def logits(squared: Tensor, inverse: bool = True) -> Tensor:
    """Start of the candidates' z (V, n) from the squares of their distances (V, n), nearest first,
    as `nearest` gives them: ratios in inverse proportion to the Euclidean distance (as VQ4DiT's
    code has it, and what works), or all equal (as the paper says).

        z_j = log(d_last / d_j)     d = |v - c|
    """
    if not inverse:
        return torch.zeros_like(squared)
    last = squared[:, -1:]
    shares = torch.where(last > 0, squared / last.clamp_min(torch.finfo(last.dtype).tiny), 1.0)
    return math.log1p(_TOUCH) - torch.log(shares.sqrt() + _TOUCH)


def mix(codebook: Tensor, candidates: Tensor, ratios: Tensor) -> Tensor:
    """sum_n r_n C[a_n]: codebook (C, D), candidates int (V, n), ratios (V, n) → (V, D).

    index_select and not codebook[candidates]: its backward is measured to be a hundred times as
    fast on a CPU.
    """
    chosen = codebook.index_select(0, candidates.reshape(-1)).view(
        *candidates.shape, codebook.shape[1]
    )
    return (chosen * ratios[..., None]).sum(1)
