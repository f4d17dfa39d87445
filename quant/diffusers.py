"""Models in scripts: the one room that knows diffusers, and how its names map onto Black Forest
Labs' (and ComfyUI's).

`load_quantized` makes a quantized file a diffusers FLUX.1 transformer (for
`FluxPipeline(transformer=...)`), `save_quantized` writes it back, `record_inputs` draws with the
16-bit model to see what its layers read, `flux_teacher` lets codewords be calibrated on it, and
`euler` is the sampler for both.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping

import diffusers
import torch
from torch import Tensor, nn

from .calibration import recorder
from .calibration.statistics import InputStats
from .files.checkpoint import FileRefused, QuantizedFile, open_quantized
from .files.source import StateDictSource
from .files.writer import TensorSpec, Writer, check_target, metadata_room
from .interop.convert import open_source
from .interop.names import families
from .vq4dit.calibrate import Teacher
from .weights import formats
from .weights import modules as svdquant_linear
from .weights import vq as vq_weight
from .weights.base import StoredLinear, StoredWeight
from .weights.fuse import join_rows

FORMATS = formats.FORMATS | {vq_weight.VQWeight.FORMAT: vq_weight.VQWeight}
TOKEN_STD = 0.25  # of T5's outputs
SHIFT = 1.15  # of FLUX.1 dev's time schedule at small sizes, and ComfyUI's default for it

# A family's last way to put a module together is that of diffusers' own, unquantized modules.
_FLUX = next(family for family in families() if family.name == "FLUX.1")
_TO_DIFFUSERS = {
    module: [part.module for part in ways[-1].parts] for module, ways in _FLUX.rows.items()
}
_TO_FLUX = {
    part: (module, i) for module, parts in _TO_DIFFUSERS.items() for i, part in enumerate(parts)
}


def diffusers_parts(module: str) -> list[str] | None:
    """Diffusers' modules that make up one FLUX module, in row order: 'single_blocks.3.linear1' →
    to_q, to_k, to_v, proj_mlp.
    """
    pattern, number = _FLUX.numbered(module)
    parts = _TO_DIFFUSERS.get(pattern)
    return parts and [part.replace("#", number) for part in parts]


def flux_module(part: str) -> tuple[str, int] | None:
    """The FLUX module that holds a diffusers module, and its place in it: '….attn.to_k' →
    ('double_blocks.0.img_attn.qkv', 1).
    """
    pattern, number = _FLUX.numbered(part)
    row = _TO_FLUX.get(pattern)
    return row and (row[0].replace("#", number), row[1])


def to_flux_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A FluxTransformer2DModel's state dict under Black Forest Labs' names (q, k, v joined; RMS
    norms as '.scale').
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        part, _, parameter = name.rpartition(".")
        row = flux_module(part)
        if row is None:
            raise ValueError(f"{name} is no part of a FLUX transformer")
        module, place = row
        suffix = "scale" if module.endswith("_norm") else parameter
        parts.setdefault(f"{module}.{suffix}", {})[place] = (
            _swap_halves(tensor) if module in _FLUX.swapped else tensor
        )
    return {name: torch.cat([pieces[i] for i in sorted(pieces)]) for name, pieces in parts.items()}


def to_diffusers_names(state: dict[str, Tensor], rows: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `to_flux_names`; rows gives each diffusers module's number of output rows, to
    split the joined ones.
    """
    out = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        parts = diffusers_parts(module)
        if parts is None:
            raise ValueError(f"{name} is no part of a FLUX transformer")
        pieces = tensor.split([rows[part] for part in parts]) if len(parts) > 1 else [tensor]
        for part, piece in zip(parts, pieces, strict=True):
            out[f"{part}.{'weight' if parameter == 'scale' else parameter}"] = (
                _swap_halves(piece) if module in _FLUX.swapped else piece
            )
    return out


def _swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) ↔ (scale, shift): the two libraries order the last modulation differently."""
    return torch.cat(tensor.chunk(2)[::-1])


def flux_transformer(
    state: dict[str, Tensor] | None = None, **config
) -> diffusers.FluxTransformer2DModel:
    """Builds diffusers' FLUX from its config, or from a state dict in Black Forest Labs' names
    (sizes are read off the shapes).
    """
    if state is None:
        return diffusers.FluxTransformer2DModel(**config)
    model = diffusers.FluxTransformer2DModel(**(flux_config(state) | config))
    rows = {
        name: module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model.load_state_dict(to_diffusers_names(state, rows))
    return model


def flux_config(state: Mapping, names: Iterable[str] = ()) -> dict:
    """The diffusers config of a FLUX.1 state dict in Black Forest Labs' names, from names (all of
    them, or those of `names`) and shapes.
    """
    names = list(names or state)

    def depth(kind: str) -> int:
        return 1 + max(
            (int(name.split(".")[1]) for name in names if name.startswith(f"{kind}.")), default=-1
        )

    return dict(
        patch_size=1,
        in_channels=state["img_in.weight"].shape[1],
        num_layers=depth("double_blocks"),
        num_single_layers=depth("single_blocks"),
        attention_head_dim=128,
        num_attention_heads=state["img_in.weight"].shape[0] // 128,
        joint_attention_dim=state["txt_in.weight"].shape[1],
        pooled_projection_dim=state["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in state,
    )


def tiny_autoencoder(
    state: dict[str, Tensor] | None = None, latent_channels: int = 16
) -> diffusers.AutoencoderTiny:
    """Diffusers' TAESD, optionally from a state dict in TAESD's names (taesd_encoder.*,
    taesd_decoder.*).
    """
    vae = diffusers.AutoencoderTiny(
        latent_channels=latent_channels, scaling_factor=1.0, shift_factor=0.0
    )
    if state is not None:
        vae.load_state_dict(dict(_taesd_names(state, to_diffusers=True)))
    return vae


def to_taesd_names(vae: diffusers.AutoencoderTiny) -> dict[str, Tensor]:
    """An AutoencoderTiny's weights under TAESD's own names, as ComfyUI's VAE loader reads them."""
    return dict(_taesd_names(vae.state_dict(), to_diffusers=False))


def _taesd_names(state: dict[str, Tensor], to_diffusers: bool) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if to_diffusers and (match := re.match(r"taesd_(encoder|decoder)\.(\d+)(\..*)", name)):
            half, index, rest = match[1], int(match[2]), match[3]
            # TAESD's decoder counts its clamp as layer 0
            yield f"{half}.layers.{index - (half == 'decoder')}{rest}", tensor
        elif not to_diffusers and (
            match := re.match(r"(encoder|decoder)\.layers\.(\d+)(\..*)", name)
        ):
            half, index, rest = match[1], int(match[2]), match[3]
            yield f"taesd_{half}.{index + (half == 'decoder')}{rest}", tensor


def load_quantized(
    path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, train: bool = False
) -> nn.Module:
    """A quantized FLUX.1 file, of either method or a published one, or one made of `dit_source`, as
    diffusers' transformer on the CPU; its layers stay quantized.

    dtype   of the layers that the file keeps in 16 bit
    train   make the low-rank factors and biases of 4-bit layers, and codebooks, scales and biases
      of those of codewords, parameters
    Raises FileRefused for a file that is damaged, or of another model.
    """
    file = open_source(path)
    if '"DiTTransformer2DModel"' in file.metadata.get("config", ""):
        return _load_dit(open_quantized(path), dtype, train)
    kept = {
        spec.name: spec
        for unit in file.units
        if unit not in file.layers
        for spec in file.specs(unit)
    }
    if not {"img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"} <= kept.keys():
        raise FileRefused(
            f"{file.path.name} is no FLUX.1 transformer, the only model that loads into diffusers;"
            " load it in ComfyUI."
        )
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            **flux_config(kept, [*kept, *(f"{name}.weight" for name in file.layers)])
        )
    rows = {name: module.out_features for name, module in recorder.find_linears(model).items()}
    for name, facts in file.layers.items():
        whole, start = (
            _swap_rows(name, FORMATS[facts["format"]].from_tensors(file.layer(name), name)),
            0,
        )
        for part in diffusers_parts(name):
            recorder.replace(model, part, as_module(whole.rows(start, start + rows[part]), train))
            start += rows[part]
    tensors = {
        name: tensor.to(dtype)
        for unit in file.units
        if unit not in file.layers
        for name, tensor in file.unit(unit).items()
    }
    state = to_diffusers_names(tensors, rows)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty or unexpected:
        raise FileRefused(
            f"{file.path.name} does not fit FLUX.1: {(empty or unexpected)[0]} is"
            f" {'missing' if empty else 'unknown'}; quantize it again."
        )
    return model.eval()


def save_quantized(model: nn.Module, target: str | os.PathLike, origin: str | os.PathLike) -> None:
    """Writes a transformer of `load_quantized` back under ComfyUI's names, e.g. after training;
    metadata come from its origin.

    Unchanged tensors come out bit for bit. Raises FileRefused for a target that cannot be written
    or is the origin itself.
    """
    check_target(origin, target)
    file = open_quantized(origin)
    modules = dict(model.named_modules())
    units: dict[str, dict[str, Tensor]] = {}
    for name, facts in file.layers.items():
        pieces = [modules[part].quantized() for part in diffusers_parts(name)]
        whole = (
            join_rows(pieces) if facts.get("smooth_rows") else FORMATS[facts["format"]].cat(pieces)
        )
        units[name] = _swap_rows(name, whole).tensors(name)
    kept = to_flux_names(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if _layer_of(name, modules, quantized=True) is None
        }
    )
    for name, tensor in kept.items():
        name = name if name in file.header.tensors else name.removesuffix("scale") + "weight"
        units[name] = {name: tensor.to(file.header.tensors[name].dtype)}
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for unit in units.values()
        for name, tensor in unit.items()
    ]
    metadata = {key: value for key, value in file.metadata.items() if key != "checksums"}
    with Writer(
        target,
        specs,
        identity=f"saved from {os.path.realpath(origin)}",
        room=metadata_room(metadata),
    ) as writer:
        for unit, tensors in units.items():
            writer.write(unit, tensors, {})
        writer.finish([metadata])


def as_module(weight: StoredWeight, train: bool = False) -> StoredLinear:
    """The module for a quantized linear of any format."""
    return (vq_weight if isinstance(weight, vq_weight.VQWeight) else svdquant_linear).as_module(
        weight, train
    )


def _swap_rows(name: str, weight):
    """`_swap_halves` for a quantized layer."""
    half = weight.shape[0] // 2
    return (
        weight.cat([weight.rows(half, 2 * half), weight.rows(0, half)])
        if name in _FLUX.swapped
        else weight
    )


def _layer_of(name: str, layers: Mapping, quantized: bool = False) -> str | None:
    """The quantized linear that a tensor belongs to, or None."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
    return next(
        (
            owner
            for owner in owners
            if owner in layers and (not quantized or hasattr(layers[owner], "quantized"))
        ),
        None,
    )


def velocity(
    flux: nn.Module, latents: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor
) -> Tensor:
    """FLUX's velocity for latents (batch, 16, h, w) at times t (batch,), 1 = noise; the same shape
    (of its output channels).

    tokens (batch, T, context) and pooled (batch, vector) are the prompt, guidance (batch,) the
    distilled scale.
    """
    batch, channels, height, width = latents.shape
    h, w = height // 2, width // 2
    packed = (
        latents.reshape(batch, channels, h, 2, w, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, h * w, channels * 4)
    )
    ids = torch.stack(
        [torch.zeros(h, w), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")], -1
    )
    out = flux(
        hidden_states=packed,
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3).to(packed),
        img_ids=ids.reshape(h * w, 3).to(packed),
        return_dict=False,
    )[0]
    return (
        out.reshape(batch, h, w, -1, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(batch, -1, height, width)
    )


def schedule(steps: int, shift: float = SHIFT) -> Tensor:
    """Shifted times from 1 to 0, float32 (steps + 1,): t = e^s / (e^s + 1/u - 1), as in FLUX.1's
    reference sampler.
    """
    u, scale = torch.linspace(1, 0, steps + 1), math.exp(shift)
    return scale * u / (1 + (scale - 1) * u)


@torch.no_grad()
def euler(
    flux: nn.Module,
    noise: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    steps: int,
    guidance: float = 3.5,
    shift: float = SHIFT,
    report: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Euler's method for the rectified flow dx/dt = velocity, from noise (batch, 16, h, w) at t = 1
    to latents at t = 0.
    """
    x, times = noise, schedule(steps, shift).to(noise)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(
            flux, x, times[i].expand(len(x)), tokens, pooled, x.new_full((len(x),), guidance)
        )
        report(i + 1)
    return x


def drawing(
    model: nn.Module,
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    shift: float = SHIFT,
) -> Callable[[], None]:
    """A function that draws with a FLUX.1, the same each time it is called; arguments as in
    `record_inputs`.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokens is None or pooled is None:
        config = model.config
        tokens = torch.randn(batch, 64, config.joint_attention_dim, generator=generator) * TOKEN_STD
        pooled = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    noise = torch.randn(len(tokens), model.config.in_channels // 4, side, side, generator=generator)

    def run() -> None:
        for part in range(0, len(tokens), batch):
            chosen = slice(part, part + batch)
            euler(model, noise[chosen], tokens[chosen], pooled[chosen], steps, shift=shift)

    return run


def flux_teacher(
    state: Mapping[str, Tensor],
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    cap: int = 2 << 30,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    shift: float = SHIFT,
) -> Teacher:
    """A 16-bit FLUX.1 at work, to calibrate codewords on; arguments as in `record_inputs`. With
    random prompts it needs no data.
    """
    model = flux_transformer(dict(state)).eval()
    return Teacher(
        model, drawing(model, tokens, pooled, steps, side, seed, batch, shift), diffusers_parts, cap
    )


def record_inputs(
    state: Mapping[str, Tensor],
    names: Iterable[str],
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    cap: int = 4 << 30,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, InputStats]:
    """What the named linears of a 16-bit FLUX.1 read while it draws.

    state           its weights under Black Forest Labs' names
    tokens, pooled  prompts (P, T, context) and (P, vector); None draws them at random, spread like
      T5's and CLIP's outputs
    cap             bytes of statistics to hold at once: more layers than fit are recorded in
      several runs
    side            of the latents: 32 is a picture of 256 pixels
    batch           pictures at a time
    Returns name → InputStats under the names given.
    """
    model = flux_transformer(dict(state)).eval()
    run = drawing(model, tokens, pooled, steps, side, seed, batch)
    # parts joined in one module read the same input
    readers = {name: diffusers_parts(name)[0] for name in names}
    recorded = recorder.collect(model, readers.values(), run, cap, report, seed=seed)
    return {name: recorded[reader] for name, reader in readers.items()}


# ---- DiT: class labels instead of prompts, the model of VQ4DiT's paper ---------------------------


def dit_source(model: diffusers.DiTTransformer2DModel, name: str = "DiT") -> StateDictSource:
    """A class-conditional DiT (256 or 512 pixels) to quantize; its config goes with it, so that
    `load_quantized` can build it again.
    """
    source = StateDictSource({key: tensor for key, tensor in model.state_dict().items()}, name)
    source.metadata = {
        "config": json.dumps(
            dict(model.config) | {"_class_name": type(model).__name__}, default=str
        )
    }
    return source


def dit_teacher(
    model: diffusers.DiTTransformer2DModel,
    scheduler,
    pictures: int = 8,
    steps: int = 10,
    guidance: float = 4.0,
    seed: int = 0,
    batch: int = 4,
    cap: int = 2 << 30,
) -> Teacher:
    """A DiT at work on noise and random classes with classifier-free guidance, as VQ4DiT
    calibrates; scheduler: diffusers' DDIMScheduler.
    """
    config = model.config
    empty = config.num_embeds_ada_norm  # the label of "no class" behind the real ones

    @torch.no_grad()
    def run() -> None:
        generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(steps)
        for start in range(0, pictures, batch):
            count = min(batch, pictures - start)
            labels = torch.randint(empty, (count,), generator=generator)
            x = torch.randn(
                count,
                config.in_channels,
                config.sample_size,
                config.sample_size,
                generator=generator,
            )
            for t in scheduler.timesteps:
                both = torch.cat([labels, torch.full_like(labels, empty)])
                noise = model(
                    torch.cat([x, x]), timestep=t.expand(2 * count), class_labels=both
                ).sample[:, : config.in_channels]
                asked, free = noise.chunk(2)
                x = scheduler.step(free + guidance * (asked - free), t, x).prev_sample

    return Teacher(model, run, cap=cap)


def _load_dit(file: QuantizedFile, dtype: torch.dtype, train: bool) -> nn.Module:
    config = {key: value for key, value in file.fact("config").items() if not key.startswith("_")}
    # not on the meta device: the table of positions is computed, not stored
    model = diffusers.DiTTransformer2DModel(**config)
    for name, facts in file.layers.items():
        recorder.replace(
            model,
            name,
            as_module(FORMATS[facts["format"]].from_tensors(file.layer(name), name), train),
        )
    kept = [name for name in file.header.tensors if _layer_of(name, file.layers) is None]
    missing, unexpected = model.load_state_dict(
        {name: file.read(name).to(dtype) for name in kept}, strict=False
    )
    lost = [
        name for name in missing if _layer_of(name, file.layers) is None and "pos_embed" not in name
    ]
    if lost or unexpected:
        raise FileRefused(
            f"{file.path.name} does not fit its model: {(lost or unexpected)[0]} is"
            f" {'missing' if lost else 'unknown'}; quantize it again."
        )
    return model.eval()
