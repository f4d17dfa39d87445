"""diffusers' class-conditional DiT, the model of VQ4DiT's paper: class labels in place of prompts.

source = dit_source(model)                              # to quantize_checkpoint
teacher = dit_teacher(model, dit_scheduler())           # to calibrate codewords on
model = load_quantized(path)                            # quantized, in diffusers

Classes are all that a DiT is conditioned on, so noise and random classes are what it will draw:
calibration needs no data, and what is recorded is measured on pictures.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..calibration import recorder
from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from ..files import dit_names
from ..files.errors import FileRefused
from ..files.source import Source, StateDictSource

CLASSES = "random classes"
"""The kind of what is drawn, as files have it."""


def dit_source(model: diffusers.DiTTransformer2DModel, name: str = "DiT") -> StateDictSource:
    """A class-conditional DiT (256 or 512 pixels) to quantize; its config goes with it, so that
    `load_quantized` can build it again.
    """
    state = dict(model.state_dict())
    for copy in dit_names.copies(state, state.__getitem__):
        del state[copy]
    source = StateDictSource(state, name)
    source.metadata = {
        "config": json.dumps(
            dict(model.config) | {"_class_name": type(model).__name__}, default=str
        )
    }
    return source


def dit_model(source: Source | StateDictSource) -> nn.Module:
    """The 16-bit DiT of a source, in float32 on the CPU. Raises FileRefused for one without its
    config.
    """
    if f'"{dit_names.CLASS_NAME}"' not in source.metadata.get("config", ""):
        raise FileRefused(
            f"{source.name} has no config of diffusers' DiT, without which it cannot be run; choose"
            " the folder that diffusers saved, with its config.json, or use --preset fast."
        )
    facts = json.loads(source.metadata["config"])
    config = facts.get("transformer", facts)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    model = diffusers.DiTTransformer2DModel(**given)
    state = {name: source.read(name).float() for name in source.shapes}
    as_stored(facts, model, state)
    lost, unknown = model.load_state_dict(state, strict=False)
    shared = model.transformer_blocks[-1].norm1.emb is model.transformer_blocks[0].norm1.emb
    wrong = [name for name in lost if not (shared and ".norm1.emb." in name)]
    if wrong or unknown:
        raise FileRefused(
            f"{source.name} does not fit its config: it {'lacks' if wrong else 'has'}"
            f" {(wrong or unknown)[0]}; download the folder again."
        )
    return model.eval().requires_grad_(False)


def as_stored(facts: Mapping[str, Any], model: Any, state: dict[str, Tensor]) -> None:
    """One embedder for all blocks of a DiT, where there are no others; and what one under its
    authors' names has that diffusers' has not: their table of positions, their frequencies. facts:
    the metadata's config; state: the model's tensors, of which the table is taken out.
    """
    if dit_names.POSITIONS in state:
        model.pos_embed.pos_embed = state.pop(dit_names.POSITIONS).float()
    embedders = {name.partition(".norm1.emb.")[0] for name in state if ".norm1.emb." in name}
    if len(embedders) == 1:
        for block in model.transformer_blocks:
            block.norm1.emb = model.transformer_blocks[0].norm1.emb
    if dit_names.SHIFT in facts:
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = facts[dit_names.SHIFT]


def dit_scheduler() -> diffusers.DDIMScheduler:
    """The noise that DiT was trained with: 1000 steps, variances evenly spread from 1e-4 to 0.02
    (Peebles and Xie, 2023, arXiv:2212.09748, section 4).
    """
    return diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)


@dataclass(frozen=True)
class Classes:
    """What a DiT draws while it is watched: pictures of random classes, with classifier-free
    guidance, in `steps` steps; batch: of them at a time.
    """

    pictures: int = 8
    steps: int = 10
    guidance: float = 4.0
    seed: int = 0
    batch: int = 4

    def provenance(self) -> dict:
        """What a recording depends on, for the file's metadata."""
        return {"kind": CLASSES, **{key: vars(self)[key] for key in vars(self) if key != "batch"}}

    def run(
        self, model: Any, scheduler: Any, shown: Callable[[range], None] = lambda numbers: None
    ) -> Callable[[], None]:
        """A function that draws all pictures, the same each time it is called. shown(numbers of
        the pictures) is called before each batch.
        """
        config = model.config
        empty = config.num_embeds_ada_norm  # the label of "no class" behind the real ones
        shape = (config.in_channels, config.sample_size, config.sample_size)

        @torch.no_grad()
        def run() -> None:
            generator = torch.Generator().manual_seed(self.seed)
            scheduler.set_timesteps(self.steps)
            for start in range(0, self.pictures, self.batch):
                count = min(self.batch, self.pictures - start)
                shown(range(start, start + count))
                labels = torch.randint(empty, (count,), generator=generator)
                x = torch.randn(count, *shape, generator=generator)
                # each picture with its class, then without
                both = torch.stack([labels, torch.full_like(labels, empty)], 1).flatten()
                for t in scheduler.timesteps:
                    twice = x.repeat_interleave(2, 0)
                    out = model(twice, timestep=t.expand(2 * count), class_labels=both).sample
                    asked, free = out[:, : config.in_channels].unflatten(0, (count, 2)).unbind(1)
                    x = scheduler.step(free + self.guidance * (asked - free), t, x).prev_sample

        return run


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
    classes = Classes(pictures, steps, guidance, seed, batch)
    return Teacher(model, classes.run(model, scheduler), cap=cap)


def record_dit(
    model: nn.Module,
    names: list[str],
    classes: Classes,
    cap: int = 4 << 30,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, InputStats]:
    """What the named linears of a DiT read while it draws; cap: as in `record_inputs`."""
    drawn: list[range] = []
    return recorder.collect(
        model,
        names,
        classes.run(model, dit_scheduler(), drawn.append),
        cap,
        report,
        seed=classes.seed,
        shown=recorder.Shown(classes.pictures, lambda: drawn[-1]),
    )
