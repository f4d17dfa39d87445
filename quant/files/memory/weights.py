"""What a file will hold in memory, from its header alone: a model, a text encoder, a VAE, a LoRA.

The scratch memory of a W4A4 layer's kernels, of M tokens, K inputs and rank R, counted at its
widest (kernels/backends/cubins): codes of a byte each, a float32 scale for 64 of them, the branch's
inner products, and behind a fused GELU one of these for each 128 columns:

    scratch = M * (K + K / 16 + 4 R + R K / 32) bytes
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..architectures import families, recognise
from ..checkpoint import QuantizedFile
from ..errors import FileRefused
from ..report import Report
from ..safetensors import TensorSpec, read_header
from ..source import Source
from ..text_encoders import family_of
from .decoders import KINDS, Decoder, decoder_of
from .published import Sampler, Shapes, encoders, sampler, sampler_of, vaes
from .published import models as published_models

TOKENS = 512
"""Of a prompt: what FLUX.1's T5 reads at most."""
_EMBEDDING = re.compile(r"shared|embed|relative_attention_bias|lm_head")  # and what is not run
# an encoder that is smaller gains nothing from 4 bits
_WORTH = 1_000_000_000
# of Mage-Flow's VAE: ComfyUI leaves out the encoder that its latents were made like
_NOT_LOADED = ("pipeline.y_embedder.encoder.", "pipeline.y_embedder.bottleneck.")
_DOWN = re.compile(r"(lora_down|lora_A|lora\.down)(\.\w+)?\.weight$")


@dataclass(frozen=True)
class ModelWeights:
    """A diffusion model. bytes: all of it; modulation: of that, what can stay in RAM; widest,
    rank: inputs of its widest W4A4 layer (0: it has none) and the branch's rank; to_quantize: the
    weights that become 4-bit; four_bit: what it is then (None: it is quantized).
    """

    name: str
    bytes: int
    sampler: Sampler
    modulation: int = 0
    widest: int = 0
    rank: int = 32
    to_quantize: int = 0
    four_bit: ModelWeights | None = None

    def scratch(self, tokens: int, lora_rank: int = 0) -> int:
        """Bytes of the kernels' scratch memory for so many tokens."""
        k, r = self.widest, self.rank + lora_rank
        return tokens * (k + k // 16 + 4 * r + r * k // 32) if k else 0


@dataclass(frozen=True)
class EncoderWeights:
    """A text encoder. widest: outputs of its widest layer; hidden: of its attention; largest:
    weights of its largest matrix; bytes_4: with 4-bit weights (None: it is quantized, small, or one
    that *Quantize Text Encoder* refuses).
    """

    name: str
    bytes: int
    hidden: int
    widest: int
    largest: int
    bytes_4: int | None = None

    @property
    def work(self) -> int:
        """Bytes that reading a prompt takes, in float32 as ComfyUI's encoders compute: a block's
        activations, scores of heads of 64, and a matrix that is brought to float32.
        """
        scores = self.hidden // 64 * TOKENS**2 * 2
        return 4 * (6 * TOKENS * self.widest + scores + self.largest)


@dataclass(frozen=True)
class VaeWeights:
    """A VAE. numbers: of its weights; decoder: None for one that the plan does not know."""

    name: str
    numbers: int
    decoder: Decoder | None


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA beside the model."""

    name: str
    bytes: int
    rank: int


# ---- models


def model_of(
    path: Path, low_bit: Callable[[Path], QuantizedFile | None], predict: Callable[[Source], Report]
) -> ModelWeights:
    """A model's file. low_bit: opens one that is quantized (None: it is not); predict: what
    quantizing a source would give. Raises FileRefused.
    """
    file = low_bit(path)
    if file is not None:
        return of_quantized(file)
    source = Source(path)
    return of_source(source.name, source.shapes, source.bytes, predict(source))


def of_quantized(file: QuantizedFile) -> ModelWeights:
    """A quantized model, whoever made it."""
    layers = {
        name: [spec for spec in file.specs(name) if not spec.name.endswith(".comfy_quant")]
        for name in file.layers
    }
    others = [spec for unit in file.units if unit not in layers for spec in file.specs(unit)]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (0, 0) for name in layers}
    shapes |= {spec.name: spec.shape for spec in others}
    size = {name: sum(spec.nbytes for spec in specs) for name, specs in layers.items()}
    patterns = _modulation_of(file.family, shapes, file.path.name)
    branches = [
        _down(layers[name]) for name, facts in file.layers.items() if "svdquant" in facts["format"]
    ]
    widest = max(branches, default=(0, 0))
    return ModelWeights(
        file.path.name,
        sum(size.values()) + sum(spec.nbytes for spec in others),
        sampler_of(shapes, file.path.name),
        sum(
            size[name]
            for name, facts in file.layers.items()
            if facts["format"] == "awq_w4a16" and _widens(layers[name]) and _is(name, patterns)
        ),
        widest[0],
        widest[1],
    )


def _modulation_of(family: str, shapes: Shapes, file: str) -> tuple[str, ...]:
    known = next((known for known in families() if known.name == family), None)
    return (recognise(shapes, file, native=True) if known is None else known).modulation


def _down(specs: list[TensorSpec]) -> tuple[int, int]:
    """(K, rank) of a layer with smoothing factors and perhaps a branch."""
    shapes = {spec.name.rpartition(".")[2]: spec.shape for spec in specs}
    k = shapes["weight_smooth_factor"][-1]
    return k, shapes.get("weight_proj_down", (k, 0))[1]


def _widens(specs: list[TensorSpec]) -> bool:
    """Whether a layer gives more numbers than it reads; a byte holds two weights."""
    weight = next(spec for spec in specs if spec.name.endswith(".weight"))
    return weight.shape[0] > 2 * weight.shape[1]


def of_source(name: str, shapes: Shapes, size: int, report: Report) -> ModelWeights:
    """A 16-bit model of `size` bytes. report: what quantizing it would give."""
    changed = [row for row in report.rows if row.action != "keep"]
    patterns = recognise(shapes, name, native=True).modulation
    matrices = {row.name: shapes[f"{row.name}.weight"] for row in changed}
    modulation = sum(
        row.bytes_after
        for row in changed
        if row.action == "w4a16"
        and matrices[row.name][0] > matrices[row.name][1]
        and _is(row.name, patterns)
    )
    widest = max((matrices[row.name][1] for row in changed if row.action == "w4a4"), default=0)
    numbers = sum(math.prod(shape) for shape in matrices.values())
    return _with_four_bit(
        ModelWeights(name, size, sampler_of(shapes, name), to_quantize=numbers),
        (report.bytes_after, modulation, widest),
    )


def published(name: str) -> ModelWeights | None:
    """A published model in 16 bits by its name; None for another name."""
    row = published_models().get(name)
    if row is None:
        return None
    factor = row["factor"]
    told = {factor["of"]: tuple(row["told"])} if isinstance(factor, dict) else {}
    model = ModelWeights(
        name, row["bytes_16"], sampler(row, told, name), to_quantize=row["weights"]
    )
    return _with_four_bit(model, (row["bytes_4"], row["modulation"], row["widest"]))


def _with_four_bit(model: ModelWeights, then: tuple[int, int, int]) -> ModelWeights:
    """then: bytes, modulation and widest inputs of the 4-bit file."""
    size, modulation, widest = then
    made = replace(
        model,
        name=f"{model.name}, 4 bit",
        bytes=size,
        modulation=modulation,
        widest=widest,
        to_quantize=0,
    )
    return replace(model, four_bit=made)


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- text encoders, VAEs, LoRAs


def encoder_of(path: Path) -> EncoderWeights:
    """A text encoder's file. Raises FileRefused for what is no text encoder."""
    header = read_header(path)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    low_bit = any(name.endswith(".comfy_quant") for name in shapes)
    size = sum(info.nbytes for info in header.tensors.values())
    if not any(_EMBEDDING.search(name) for name in shapes):
        raise FileRefused(
            f"{path.name} has no embedding of words, so it is no text encoder; choose a file from"
            " the text_encoders folder."
        )
    return encoder(path.name, shapes, size, low_bit)


def encoder(name: str, shapes: Shapes, size: int | None, low_bit: bool = False) -> EncoderWeights:
    """A text encoder by its shapes. size: bytes as stored (None: 16 bit); low_bit: it is
    quantized.
    """
    matrices = {key: shape for key, shape in shapes.items() if _is_matrix(key, shape)}
    if not matrices:
        raise FileRefused(f"{name} has no layers; choose a file from the text_encoders folder.")
    numbers = 2 * sum(math.prod(shape) for shape in shapes.values())
    size = numbers if size is None else size
    half = 2 if low_bit else 1  # inputs for each number of a packed row
    return EncoderWeights(
        name,
        size,
        hidden=Counter(shape[1] for shape in matrices.values()).most_common(1)[0][0] * half,
        widest=max(shape[0] for shape in matrices.values()),
        largest=max(math.prod(shape) for shape in matrices.values()) * half,
        bytes_4=None if low_bit or size < _WORTH else _four_bit(shapes),
    )


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and not _EMBEDDING.search(name)


def _four_bit(shapes: Shapes) -> int | None:
    """Bytes as *Quantize Text Encoder* makes the file, None for an encoder that it refuses: blocks'
    matrices in 4 bits with an 8-bit scale for 32 weights and a float32 one for a row; tables, heads
    and vision towers in 8 bits with a float32 scale for a row; the rest in 16.
    """
    family = family_of(shapes)
    if family is None:
        return None
    total = 0.0
    for name, shape in shapes.items():
        numbers, layer = math.prod(shape), name.removesuffix(".weight")
        if len(shape) != 2:
            total += 2 * numbers
        elif _is(layer, family.rows8):
            total += numbers + 4 * shape[0]
        elif _is(layer, family.blocks):
            total += numbers * (0.5 + 1 / 32) + 4 * shape[0]
        else:
            total += 2 * numbers
    return int(total)


def published_encoder(name: str) -> EncoderWeights | None:
    """A published text encoder in 16 bits by its name; None for another name."""
    row = encoders().get(name)
    if row is None:
        return None
    shape = (row["hidden"], row["widest"], row["largest"])
    return EncoderWeights(name, row["bytes_16"], *shape, bytes_4=row["bytes_4"])


def published_vae(name: str) -> VaeWeights | None:
    """A published VAE likewise."""
    row = vaes().get(name)
    return None if row is None else VaeWeights(name, row["numbers"], KINDS[name])


def vae_of(path: Path) -> VaeWeights:
    """A VAE's file."""
    shapes = {
        name: info.shape
        for name, info in read_header(path).tensors.items()
        if not name.startswith(_NOT_LOADED)
    }
    return VaeWeights(path.name, sum(map(math.prod, shapes.values())), decoder_of(shapes))


def lora_of(path: Path) -> LoraWeights:
    """A LoRA's file: its factors join the layers' own in 16 bits."""
    tensors: Mapping = read_header(path).tensors
    ranks = [info.shape[0] for name, info in tensors.items() if _DOWN.search(name)]
    numbers = sum(math.prod(info.shape) for info in tensors.values())
    return LoraWeights(path.name, 2 * numbers, max(ranks, default=0))
