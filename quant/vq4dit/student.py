"""Linear layers of codewords that can be trained: what calibration puts in the 16-bit layers'
places.

    HardVQLinear    W = scale * C[a]                      codebook, scales and bias are parameters
    SoftVQLinear    W = sum_n r_n C[a_n], r = softmax(z)  the ratios too, until all are decided

(VQ4DiT, Deng et al., 2024, arXiv:2408.17131, eq. 6.) A layer of the file may be several modules of
the model (q, k and v, say): each `RowSlice` computes its rows of the layer.
"""

import torch
from torch import Tensor, nn

from ...kernels.reference import hadamard64
from ..job.whole_groups import with_zeros
from . import codebook as codebooks
from .fit import Fitted

FROZEN = 0.99  # a ratio above it is decided
_DECIDED = 1e4  # z of a decided candidate; the others have 0: softmax gives 1 and 0 exactly


class HardVQLinear(nn.Module):
    """Codes are fixed; codebook, scale and bias are parameters."""

    codes: Tensor

    def __init__(self, fitted: Fitted):
        super().__init__()
        self.rotation = fitted.rotation
        self.register_buffer("codes", fitted.codes.int(), persistent=False)
        self.codebook = nn.Parameter(fitted.codebook.clone())
        self.scale = None if fitted.scale is None else nn.Parameter(fitted.scale.clone())
        self.bias = None if fitted.bias is None else nn.Parameter(fitted.bias.clone())

    def matrix(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the matrix in the rotated basis, float32."""
        codes = self.codes[start:stop]
        chosen = self._chosen(start, stop).reshape(len(codes), -1)
        return chosen if self.scale is None else chosen * self.scale[start:stop, None]

    def _chosen(self, start: int, stop: int | None) -> Tensor:
        return self.codebook.index_select(0, self.codes[start:stop].reshape(-1))

    @torch.no_grad()
    def fitted(self) -> Fitted:
        """Its present state, detached."""

        def of(tensor):
            return None if tensor is None else tensor.detach().clone()

        return Fitted(
            self.codes.long(), of(self.codebook), of(self.scale), of(self.bias), self.rotation
        )


class SoftVQLinear(HardVQLinear):
    """Sub-vectors are mixtures of their nearest codewords until their ratios are decided."""

    candidates: Tensor
    frozen: Tensor

    def __init__(self, fitted: Fitted, weight: Tensor, count: int, inverse: bool = True):
        super().__init__(fitted)
        unit = weight if fitted.scale is None else weight / fitted.scale.clamp_min(1e-30)[:, None]
        vectors = codebooks.sub_vectors(unit, fitted.codebook.shape[1])
        candidates, distances = codebooks.nearest(
            vectors, fitted.codebook, min(count, len(fitted.codebook))
        )
        self.register_buffer("candidates", candidates.int(), persistent=False)
        self.register_buffer(
            "frozen",
            torch.zeros(len(vectors), dtype=torch.bool, device=weight.device),
            persistent=False,
        )
        self.z = nn.Parameter(codebooks.logits(distances, inverse))
        self.hard = False
        self.codebook.requires_grad_(False)  # its turn comes when the layer's codes are decided

    def _chosen(self, start: int, stop: int | None) -> Tensor:
        if self.hard:
            return super()._chosen(start, stop)
        each = self.codes.shape[1]
        rows = slice(start * each, None if stop is None else stop * each)
        return codebooks.mix(self.codebook, self.candidates[rows], self.z[rows].softmax(-1))

    def regularity(self) -> Tensor:
        """How undecided the ratios are: n times the mean of r (1 - r) over what is not frozen; 0
        once all is.
        """
        if self.hard:
            return self.z.new_zeros(())
        ratios = self.z.softmax(-1)
        spread = (ratios * (1 - ratios)).sum(-1)
        open_ones = ~self.frozen
        return (spread * open_ones).sum() / open_ones.sum().clamp_min(1)

    @torch.no_grad()
    def freeze(self, share: float = 0.99) -> None:
        """Decides every sub-vector one of whose ratios is above FROZEN, and the layer once more
        than `share` of it is decided.
        """
        if self.hard:
            return
        best, index = self.z.softmax(-1).max(-1)
        fresh = (best > FROZEN) & ~self.frozen
        self.z[fresh] = nn.functional.one_hot(index[fresh], self.z.shape[1]).to(self.z) * _DECIDED
        self.frozen |= fresh
        if self.frozen.float().mean().item() > share:
            self.harden()

    @torch.no_grad()
    def harden(self) -> None:
        """The largest ratio of each sub-vector decides."""
        if not self.hard:
            index = self.z.argmax(-1, keepdim=True)
            self.codes.copy_(self.candidates.gather(1, index).reshape(self.codes.shape))
            self.hard = True
            self.frozen.fill_(True)
            self.z.requires_grad_(False)
            self.codebook.requires_grad_(True)


class RowSlice(nn.Module):
    """The rows start..stop of a layer, as the model's module in its place."""

    def __init__(self, layer: HardVQLinear, start: int, stop: int):
        super().__init__()
        self.layer, self.start, self.stop = layer, start, stop
        self.in_features = layer.codes.shape[1] * layer.codebook.shape[1]
        self.out_features = stop - start

    @property
    def weight(self) -> Tensor:
        """The matrix on raw x: some models ask a layer for its dtype and device."""
        matrix = self.layer.matrix(self.start, self.stop)
        return hadamard64(matrix) if self.layer.rotation else matrix

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., rows) in x's dtype."""
        layer, inputs = self.layer, with_zeros(x)
        if layer.rotation:
            inputs = hadamard64(inputs.float()).to(x.dtype)
        bias = None if layer.bias is None else layer.bias[self.start : self.stop].to(x.dtype)
        return nn.functional.linear(inputs, layer.matrix(self.start, self.stop).to(x.dtype), bias)
