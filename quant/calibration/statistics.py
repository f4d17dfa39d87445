"""What a linear layer reads while the model works, in a few megabytes a layer: first and second
moments, and a sample of rows.

The Hessian of the layer's squared output error is E[x x^T] (GPTQ, Frantar et al., 2022,
arXiv:2210.17323); only its diagonal blocks are kept, as cross-block terms would take K^2 floats.
All means are over tokens of raw x; `samples` is a uniform draw of rows. Where it is told which
picture a token is of, whole pictures are held out: their moments are kept apart, so that what was
fitted to the others can be judged on pictures that it has not seen. Once all is chosen, `whole`
gives the moments of all pictures, for a last fit. That costs no memory: both Hessians are
symmetric, and one lies below the other's diagonal.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .pictures import is_held_out

# inputs a Hessian block; a layer takes the largest multiple of 64 up to it that divides K
BLOCK = 512
_MOMENTS = ("mean", "mean_square", "held_mean", "held_mean_square", "products")


def whole_groups(k: int) -> int:
    """K rounded up to a multiple of 64: of other inputs, zeros fill up the last group."""
    return k + -k % 64


def block_size(k: int, limit: int = BLOCK) -> int:
    """The largest multiple of 64 up to limit that divides K. Raises ValueError unless 64
    divides K.
    """
    if k % 64:
        raise ValueError(f"K={k} is not a multiple of the group size 64")
    return max(b for b in range(64, max(limit, 64) + 1, 64) if k % b == 0)


@dataclass
class InputStats:
    """Running statistics of a layer's input x (tokens, K). Make an empty one with
    `InputStats.empty`.

    Shapes:
        count        tokens seen, without those of pictures that are held out
        mean, mean_square  float32 (K,)
        products     float32 (K/B, B, B) | None: diagonal blocks of E[x x^T] on and above their
          diagonals; below them, those of pictures that are held out
        samples      bf16 (T, K) rows drawn uniformly from all tokens seen, in random order | None
        keys         float64 (T,) the draw: a token is kept while its random key is among the T
          largest
        owners       int64 (T,) the picture that each kept row belongs to; -1: not told
        pictures     how many are drawn, as told before the first; 0: not told
        held_count, held_mean, held_mean_square  the same of pictures that are held out
    """

    count: int
    mean: Tensor
    mean_square: Tensor
    held_mean: Tensor
    held_mean_square: Tensor
    products: Tensor | None = None
    samples: Tensor | None = None
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    capacity: int = 0
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)
    owners: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pictures: int = 0
    held_count: int = 0

    @classmethod
    def empty(
        cls,
        k: int,
        samples: int = 256,
        hessian_block: int = BLOCK,
        seed: int = 0,
        pictures: int = 0,
    ) -> "InputStats":
        """Statistics of no tokens yet. samples=0 keeps no rows, hessian_block=0 no Hessian;
        pictures: how many will be drawn, where each token's picture will be told.
        """

        def zeros(*shape):
            return torch.zeros(shape)

        k = whole_groups(k)
        b = block_size(k, hessian_block) if hessian_block else 0
        return cls(
            0,
            zeros(k),
            zeros(k),
            zeros(k),
            zeros(k),
            zeros(k // b, b, b) if b else None,
            torch.zeros(0, k, dtype=torch.bfloat16) if samples else None,
            torch.zeros(0, dtype=torch.float64),
            samples,
            torch.Generator().manual_seed(seed),
            pictures=pictures,
        )

    @staticmethod
    def bytes_needed(k: int, samples: int = 256, hessian_block: int = BLOCK) -> int:
        """Bytes of full statistics of a layer with K inputs."""
        k = whole_groups(k)
        return (
            4 * 4 * k
            + (4 * k * block_size(k, hessian_block) if hessian_block else 0)
            + 2 * k * samples
        )

    @property
    def k(self) -> int:
        """Inputs of the layer."""
        return self.mean.numel()

    @property
    def hessian(self) -> Tensor | None:
        """Diagonal blocks of E[x x^T], float32 (K/B, B, B) | None, without pictures that are held
        out.
        """
        if self.products is None:
            return None
        return self.products.triu() + self.products.triu(1).mT

    @property
    def held_out(self) -> Tensor:
        """Which of the samples are of pictures that are held out, bool (T,)."""
        return is_held_out(self.owners, self.pictures)

    @torch.no_grad()
    def update(self, x: Tensor, shown: range | None = None) -> None:
        """Takes in x (..., K) of any float dtype, accumulating in float32 on x's device. shown:
        the numbers of the pictures whose tokens x is, one picture's after the other's. Raises
        ValueError for another K.
        """
        if whole_groups(x.shape[-1]) != self.k:
            raise ValueError(
                f"statistics of {self.k} inputs were given an input of shape {tuple(x.shape)}"
            )
        rows = torch.nn.functional.pad(x.detach().flatten(0, -2), (0, self.k - x.shape[-1]))
        if not len(rows):
            return
        if self.mean.device != rows.device:
            self.to(rows.device)
        owners = _owners(len(rows), shown)
        held = is_held_out(owners, self.pictures).to(rows.device)
        for some, are_held in ((~held, False), (held, True)):
            if some.any():
                self._accumulate(rows if some.all() else rows[some], are_held)
        self._draw(rows, owners)

    def _accumulate(self, rows: Tensor, held: bool) -> None:
        values, prefix = rows.float(), "held_" if held else ""
        count = getattr(self, f"{prefix}count") + len(rows)
        share = len(rows) / count
        getattr(self, f"{prefix}mean").lerp_(values.mean(0), share)
        getattr(self, f"{prefix}mean_square").lerp_(values.square().mean(0), share)
        if self.products is not None:
            ones = torch.ones_like(self.products[0])
            mine = ones.tril(-1) if held else ones.triu()
            self.products.lerp_(_products(values, self.products), share * mine)
        setattr(self, f"{prefix}count", count)

    def whole(self) -> "InputStats":
        """Statistics of all pictures, none of which is held out any more; samples are shared."""
        if not self.held_count:
            return self
        share = self.held_count / (self.count + self.held_count)
        products = self.products
        if products is not None:
            square = self.held_mean_square.reshape(products.shape[:2])
            held = products.tril(-1).mT + torch.diag_embed(square)
            products = products.triu().lerp(held, share)
        return replace(
            self,
            count=self.count + self.held_count,
            mean=self.mean.lerp(self.held_mean, share),
            mean_square=self.mean_square.lerp(self.held_mean_square, share),
            products=products,
            owners=torch.full_like(self.owners, -1),
            pictures=0,
            held_count=0,
        )

    def _draw(self, rows: Tensor, owners: Tensor) -> None:
        """Reservoir sampling by random keys, which live on the CPU: no wait for the GPU, and few
        rows are copied.
        """
        if self.samples is None:
            return
        assert self.generator is not None  # `empty` gives one
        keys = torch.rand(len(rows), dtype=torch.float64, generator=self.generator)
        self._keep_best(self.samples, rows, keys, owners)

    def _keep_best(self, samples: Tensor, rows: Tensor, keys: Tensor, owners: Tensor) -> None:
        """Keeps what has the largest keys among the samples so far and new rows with their keys."""
        kept = len(self.keys)
        all_keys = torch.cat([self.keys, keys])
        top = all_keys.topk(min(self.capacity, len(all_keys))).indices
        old, new = top[top < kept], top[top >= kept] - kept
        device = samples.device
        chosen = rows.index_select(0, new.to(device)).to(samples.dtype)
        self.samples = torch.cat([samples.index_select(0, old.to(device)), chosen])
        self.keys = torch.cat([self.keys[old], keys[new]])
        self.owners = torch.cat([self.owners[old], owners[new]])

    def _moments(self, device) -> dict[str, Tensor]:
        return {
            name: getattr(self, name).to(device)
            for name in _MOMENTS
            if getattr(self, name) is not None
        }

    def to(self, device) -> "InputStats":
        """Moves everything but the keys, in place."""
        for name, tensor in self._moments(device).items():
            setattr(self, name, tensor)
        if self.samples is not None:
            self.samples = self.samples.to(device)
        return self


def _products(values: Tensor, blocks: Tensor) -> Tensor:
    """Means of x x^T over rows (T, K), in blocks like the given ones."""
    parts = values.reshape(len(values), *blocks.shape[:2]).transpose(0, 1)
    return parts.mT @ parts / len(values)


def _owners(rows: int, shown: range | None) -> Tensor:
    """The picture of each row, int64 (rows,); -1: not told."""
    if shown is None:
        return torch.full((rows,), -1)
    return shown.start + torch.arange(rows) * len(shown) // rows
