"""The stages of a picture, and what each holds: the prompt is encoded, the model samples, the VAE
decodes. ComfyUI loads for each what it needs, and takes the rest off the GPU.

    on the card = weights that are loaded + what computing takes
    in RAM      = the program + every weight, loaded or not

since a weight that was loaded keeps its place in RAM, or its file mapped there. On a CPU all is in
RAM, and numbers are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import comfyui
from .comfyui import GIB
from .weights import TOKENS, EncoderWeights, LoraWeights, ModelWeights, VaeWeights

ENCODE, SAMPLE, DECODE = "encode", "sample", "decode"
# of a card, for the desktop and the driver; a graphics card without a screen has more
SYSTEM = GIB
# Python, torch and ComfyUI: measured on a CPU (docs/benchmarks.md). Those of CUDA, and what it
# keeps in RAM: not yet measured
PROGRAM, PROGRAM_CUDA = 900_000_000, 3_000_000_000
_ON_CARD, _ON_CPU = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Work:
    """What is to be made. size: (width, height) in pixels; pictures: of a batch; references:
    pictures that the model looks at, of that size; card: bytes of the GPU's memory (None: a CPU);
    ram: bytes of the computer's.
    """

    size: tuple[int, int] = (1024, 1024)
    pictures: int = 1
    frames: int = 1
    references: int = 0
    card: int | None = 8 * GIB
    ram: int = 16_000_000_000

    @property
    def room(self) -> int:
        """Bytes of the card that ComfyUI can have."""
        return 0 if self.card is None else self.card - SYSTEM

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return _ON_CPU if self.card is None else _ON_CARD

    @property
    def more(self) -> int:
        """By how much a step takes more than on a GPU."""
        return comfyui.ON_A_CPU if self.card is None else 1


@dataclass(frozen=True)
class Loadout:
    """What is loaded, and how. in_ram: modulation stays in RAM; tiled: the VAE decodes tiles."""

    model: ModelWeights
    encoders: tuple[EncoderWeights, ...] = ()
    vae: VaeWeights | None = None
    loras: tuple[LoraWeights, ...] = ()
    in_ram: bool = False
    tiled: bool = False

    @property
    def model_on_card(self) -> int:
        """Bytes of the model that sampling wants on the card, LoRAs included."""
        kept = self.model.modulation if self.in_ram else 0
        return self.model.bytes - kept + sum(lora.bytes for lora in self.loras)


@dataclass(frozen=True)
class Part:
    """Some of a stage's memory. kind: weights; work, what computing takes; stays, weights of
    another stage that ComfyUI leaves there as long as there is room; program.
    """

    label: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class Stage:
    """What a stage holds. streamed: bytes of weights that do not fit on the card beside the work
    and are brought there again and again.
    """

    name: str
    card: tuple[Part, ...]
    ram: tuple[Part, ...]
    streamed: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the card, without what ComfyUI would take off it."""
        return sum(part.bytes for part in self.card if part.kind != "stays")

    @property
    def ram_peak(self) -> int:
        """Bytes in RAM."""
        return sum(part.bytes for part in self.ram)

    def fits(self, work: Work) -> bool:
        """Whether nothing is streamed and nothing runs over."""
        return not self.streamed and self.peak <= work.room and self.ram_peak <= work.ram


def stages(loadout: Loadout, work: Work) -> list[Stage]:
    """The stages in their order; one of a file that nobody named is left out."""
    found = []
    if loadout.encoders:
        found.append(_stage(ENCODE, _encoders(loadout), _encoding(loadout), loadout, work))
    found.append(_stage(SAMPLE, _model(loadout), _sampling(loadout, work), loadout, work))
    if loadout.vae is not None and loadout.vae.decoder is not None:
        found.append(_stage(DECODE, _vae(loadout, work), _decoding(loadout, work), loadout, work))
    return found


def _encoders(loadout: Loadout) -> tuple[Part, ...]:
    return tuple(Part(one.name, one.bytes, "weights") for one in loadout.encoders)


def _model(loadout: Loadout) -> tuple[Part, ...]:
    loras = tuple(Part(lora.name, lora.bytes, "weights") for lora in loadout.loras)
    of_loras = sum(part.bytes for part in loras)
    return (Part(loadout.model.name, loadout.model_on_card - of_loras, "weights"), *loras)


def _vae(loadout: Loadout, work: Work) -> tuple[Part, ...]:
    if loadout.vae is None:
        return ()
    return (Part(loadout.vae.name, loadout.vae.numbers * work.itemsize, "weights"),)


def _encoding(loadout: Loadout) -> tuple[Part, ...]:
    return (Part("reading the prompt", max(one.work for one in loadout.encoders), "work"),)


def _sampling(loadout: Loadout, work: Work) -> tuple[Part, ...]:
    sampler = loadout.model.sampler
    one = comfyui.area(work.size, work.frames, sampler.ratios)
    area = one * work.pictures * (1 + work.references)
    tokens = area // sampler.patch**2 + TOKENS * work.pictures
    rank = sum(lora.rank for lora in loadout.loras)
    step = comfyui.sampling(sampler.factor, area, work.itemsize)
    return (
        Part("a step", step * work.more, "work"),
        Part("4-bit kernels", loadout.model.scratch(tokens, rank), "work"),
    )


def _decoding(loadout: Loadout, work: Work) -> tuple[Part, ...]:
    assert loadout.vae is not None
    decoder = loadout.vae.decoder
    assert decoder is not None
    frames = comfyui.latent_frames(work.frames, decoder.ratios[1])
    count = decoder.tiled if loadout.tiled else decoder.bytes
    takes = count(frames, work.size, work.itemsize)
    if work.card is None:
        takes = int(takes * decoder.on_a_cpu)
    return (Part("decoding a tile" if loadout.tiled else "decoding", takes, "work"),)


def _stage(
    name: str, own: tuple[Part, ...], takes: tuple[Part, ...], loadout: Loadout, work: Work
) -> Stage:
    ram = _in_ram(loadout, work)
    if work.card is None:
        return Stage(name, (), (*ram, *(part for part in takes if part.bytes)))
    wanted = sum(part.bytes for part in own)
    needed = takes[0].bytes if name != ENCODE else 0  # ComfyUI has no estimate of an encoder's
    held = comfyui.loaded(wanted, work.room, needed)
    parts = [*_shared(own, held), *(part for part in takes if part.bytes)]
    stays = _stays(name, held, needed, loadout, work)
    return Stage(name, (*parts, *stays), ram, wanted - held)


def _shared(own: tuple[Part, ...], held: int) -> list[Part]:
    """The parts of what is loaded: all of the first ones, of the last what there is room for."""
    parts = []
    for part in own:
        here = min(part.bytes, held)
        held -= here
        if here:
            parts.append(Part(part.label, here, part.kind))
    return parts


def _stays(name: str, held: int, needed: int, loadout: Loadout, work: Work) -> tuple[Part, ...]:
    """What the stage before left and need not go: `load_models_gpu` makes room for 1.1 times the
    weights beside what it sets aside.
    """
    spare = work.room - int(1.1 * held) - comfyui.set_aside(needed)
    before: tuple[Part, ...] = ()
    if name == SAMPLE:
        before = _encoders(loadout)
    elif name == DECODE:
        before = _model(loadout)
    parts = _shared(before, max(0, spare))
    return tuple(Part(part.label, part.bytes, "stays") for part in parts)


def _in_ram(loadout: Loadout, work: Work) -> tuple[Part, ...]:
    """Every weight, and the program. Modulation that the CPU computes may be packed anew for it."""
    cpu = work.card is None
    again = 0 if cpu or not loadout.in_ram else loadout.model.modulation
    parts = [
        Part("the program", PROGRAM if cpu else PROGRAM_CUDA, "program"),
        *_encoders(loadout),
        Part(loadout.model.name, loadout.model.bytes + again, "weights"),
        *(Part(lora.name, lora.bytes, "weights") for lora in loadout.loras),
        *_vae(loadout, work),
    ]
    return tuple(parts)
