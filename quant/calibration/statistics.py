"""What a linear layer reads while the model works, in a few megabytes a layer: ranges, second
moments, and a sample of rows.

The Hessian of the layer's squared output error is E[x x^T] (GPTQ, Frantar et al., 2022,
arXiv:2210.17323); only its diagonal blocks are kept, as cross-block terms would take K^2 floats.
All means are over tokens of raw x; `samples` is a uniform draw of rows. Where it is told which
picture a token is of, whole pictures are held out: their tokens are in the samples and in nothing
else, so that what was fitted to the moments can be judged on pictures that it has not seen.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pictures import is_held_out

# inputs a Hessian block; a layer takes the largest multiple of 64 up to it that divides K
BLOCK = 512
_MOMENTS = ("absmax", "low", "mean", "mean_square", "hessian")


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
        absmax, low  float32 (K,)  largest magnitude, smallest value
        mean, mean_square  float32 (K,)
        hessian      float32 (K/B, B, B) diagonal blocks of E[x x^T] | None
        samples      bf16 (T, K) rows drawn uniformly from all tokens seen, in random order | None
        keys         float64 (T,) the draw: a token is kept while its random key is among the T
          largest
        owners       int64 (T,) the picture that each kept row belongs to; -1: not told
        pictures     how many are drawn, as told before the first; 0: not told
    """

    count: int
    absmax: Tensor
    low: Tensor
    mean: Tensor
    mean_square: Tensor
    hessian: Tensor | None = None
    samples: Tensor | None = None
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    capacity: int = 0
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)
    owners: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pictures: int = 0

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
            torch.full((k,), float("inf")),
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
        return self.absmax.numel()

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
        if self.absmax.device != rows.device:
            self.to(rows.device)
        owners = _owners(len(rows), shown)
        seen = ~is_held_out(owners, self.pictures)
        if seen.all():
            self._accumulate(rows)
        elif seen.any():
            self._accumulate(rows[seen.to(rows.device)])
        self._draw(rows, owners)

    def _accumulate(self, rows: Tensor) -> None:
        values = rows.float()
        share = len(rows) / (self.count + len(rows))
        low, high = values.aminmax(dim=0)
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.absmax, torch.maximum(high.abs(), low.abs()), out=self.absmax)
        self.mean.lerp_(values.mean(0), share)
        self.mean_square.lerp_(values.square().mean(0), share)
        if self.hessian is not None:
            blocks = values.reshape(len(rows), *self.hessian.shape[:2]).transpose(0, 1)
            self.hessian.baddbmm_(blocks.mT, blocks, beta=1 - share, alpha=share / len(rows))
        self.count += len(rows)

    def _draw(self, rows: Tensor, owners: Tensor) -> None:
        """Reservoir sampling by random keys, which live on the CPU: no wait for the GPU, and few
        rows are copied.
        """
        if self.samples is None:
            return
        if self.generator is None:
            raise ValueError(
                "statistics read from a file cannot be updated further; merge them with new ones"
                " instead"
            )
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

    def merge(self, other: "InputStats") -> "InputStats":
        """Statistics of both inputs together, as a new object on this one's device. Raises
        ValueError for other shapes.
        """
        if (
            other.k != self.k
            or (other.hessian is None) != (self.hessian is None)
            or (other.samples is None) != (self.samples is None)
        ):
            raise ValueError(
                f"statistics of {self.k} and {other.k} inputs, or of different kinds, cannot be"
                " merged"
            )
        device, total = self.absmax.device, max(self.count + other.count, 1)
        mine, theirs = self._moments(device), other._moments(device)
        share = other.count / total
        means = {
            name: mine[name].lerp(theirs[name], share)
            for name in mine
            if name not in ("absmax", "low")
        }
        merged = InputStats(
            self.count + other.count,
            torch.maximum(mine["absmax"], theirs["absmax"]),
            torch.minimum(mine["low"], theirs["low"]),
            **means,
            samples=self.samples,
            keys=self.keys,
            capacity=max(self.capacity, other.capacity),
            generator=self.generator,
            owners=self.owners,
            pictures=max(self.pictures, other.pictures),
        )
        if self.samples is not None and other.samples is not None:
            merged._keep_best(self.samples, other.samples.to(device), other.keys, other.owners)
        return merged

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

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything as CPU tensors named '<prefix>.count', … for a safetensors file."""
        tensors = self._moments("cpu") | {
            "count": torch.tensor(self.count),
            "capacity": torch.tensor(self.capacity),
            "keys": self.keys,
            "owners": self.owners,
            "pictures": torch.tensor(self.pictures),
        }
        if self.samples is not None:
            tensors["samples"] = self.samples.cpu()
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "InputStats":
        """The inverse of `to_tensors`; the result can be read and merged, not updated."""
        found: dict[str, Any] = {
            name: tensors.get(f"{prefix}.{name}")
            for name in (*_MOMENTS, "samples", "keys", "count", "capacity")
        }
        missing = [
            name
            for name, tensor in found.items()
            if tensor is None and name not in ("hessian", "samples")
        ]
        if missing:
            raise ValueError(f"the statistics of {prefix} lack {', '.join(missing)}")
        kept = found["keys"]
        return cls(
            count=int(found.pop("count")),
            capacity=int(found.pop("capacity")),
            owners=tensors.get(f"{prefix}.owners", torch.full((len(kept),), -1)),
            pictures=int(tensors.get(f"{prefix}.pictures", 0)),
            **found,
        )


def _owners(rows: int, shown: range | None) -> Tensor:
    """The picture of each row, int64 (rows,); -1: not told."""
    if shown is None:
        return torch.full((rows,), -1)
    return shown.start + torch.arange(rows) * len(shown) // rows
