"""diffusers' class-conditional DiT, the model of VQ4DiT's paper: class labels in place of prompts.

source = dit_source(model)                              # to quantize_checkpoint
teacher = dit_teacher(model, DDIMScheduler(…))          # to calibrate codewords on
model = load_quantized(path)                            # quantized, in diffusers
"""

import json

import diffusers
import torch
from torch import Tensor, nn

from ..calibration.teacher import Teacher
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused
from ..files.source import StateDictSource
from ..weights import linears
from ..weights.formats import weight_of
from ..weights.modules import as_module

CLASS_NAME = "DiTTransformer2DModel"


def dit_source(model: diffusers.DiTTransformer2DModel, name: str = "DiT") -> StateDictSource:
    """A class-conditional DiT (256 or 512 pixels) to quantize; its config goes with it, so that
    `load_quantized` can build it again.
    """
    source = StateDictSource(dict(model.state_dict()), name)
    source.metadata = {
        "config": json.dumps(
            dict(model.config) | {"_class_name": type(model).__name__}, default=str
        )
    }
    return source


def dit_teacher(  # noqa: PLR0913 (a script's keywords)
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


def is_dit(file: QuantizedFile) -> bool:
    """Whether a quantized file was made of `dit_source`."""
    return f'"{CLASS_NAME}"' in file.metadata.get("config", "")


def load_dit(file: QuantizedFile, dtype: torch.dtype, train: bool) -> nn.Module:
    """A file made of `dit_source` as diffusers' model; arguments as in `load_quantized`. Raises
    FileRefused for a file that does not fit its own config.
    """
    entries = json.loads(file.metadata["config"])
    config = {key: value for key, value in entries.items() if not key.startswith("_")}
    # not on the meta device: the table of positions is computed, not stored
    model = diffusers.DiTTransformer2DModel(**config)
    modules = dict(model.named_modules())
    unexpected = [name for name in file.layers if name not in modules]
    if unexpected:
        raise _misfit(file, unexpected[0], "unknown")
    state: dict[str, Tensor] = {}
    with file:
        for name in file.units:
            if name in file.layers:
                linears.replace(model, name, as_module(weight_of(file, name), train))
            else:
                state |= {key: tensor.to(dtype) for key, tensor in file.unit(name).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    layers = tuple(f"{name}." for name in file.layers)
    lost = [name for name in missing if not name.startswith(layers) and "pos_embed" not in name]
    if lost:
        raise _misfit(file, lost[0], "missing")
    if unexpected:
        raise _misfit(file, unexpected[0], "unknown")
    return model.eval()


def _misfit(file: QuantizedFile, name: str, state: str) -> FileRefused:
    return file.refusal(f"does not fit its model: {name} is {state}; quantize it again")
