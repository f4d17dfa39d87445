"""What makes a plan fit: switches in the order in which they are tried, each turned on only where a
stage needs it, with what it saves and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .stages import DECODE, ENCODE, SAMPLE, Loadout, Stage, Work, stages
from .weights import EncoderWeights

# docs/benchmarks.md, "What quantizing costs": 11.9e9 weights in 803 s on 2 cores of an AMD EPYC
# (Zen 3), preset fast
SECONDS_A_WEIGHT = 803 / 11.9e9
# the same page, "Modulation out of VRAM": a core's time a step, for a byte of 4-bit modulation
_SECONDS_A_BYTE = 0.12 / 1.73e9
# PCI Express 4.0 x8, as an 8 GB card has it: its nominal rate
_BUS = 15.75e9


@dataclass(frozen=True)
class Switch:
    """A way to need less. stage: whose memory it saves; saves: bytes of the card, on a CPU of RAM;
    costs, how: sentences; saves_ram: whether it saves RAM, too.
    """

    name: str
    stage: str
    saves: int
    costs: str
    how: str
    saves_ram: bool = True
    on: bool = False


@dataclass(frozen=True)
class Plan:
    """A plan. before: the stages as things are; stages: with the switches that are on; loadout:
    what they load.
    """

    work: Work
    before: list[Stage]
    stages: list[Stage]
    switches: list[Switch]
    loadout: Loadout

    @property
    def peak(self) -> int:
        """Bytes that the card holds at most."""
        return max(stage.peak for stage in self.stages)

    @property
    def ram_peak(self) -> int:
        """Bytes that RAM holds at most."""
        return max(stage.ram_peak for stage in self.stages)

    @property
    def verdict(self) -> str:
        """Whether it fits, in a sentence."""
        short = [stage for stage in self.stages if not stage.fits(self.work)]
        over = [stage for stage in short if stage.peak > self.work.room and self.work.card]
        if over:
            return (
                f"does not fit: {over[0].name} takes {gigabytes(over[0].peak)} of the"
                f" {gigabytes(self.work.room)} that there are; make smaller pictures, or fewer at a"
                " time"
            )
        if self.ram_peak > self.work.ram:
            return (
                f"needs more RAM: {gigabytes(self.ram_peak)} of {gigabytes(self.work.ram)}; the"
                " rest would be read from disk again and again"
            )
        if short:
            most = max(stage.streamed for stage in short)
            return (
                f"runs, but {gigabytes(most)} of the weights come from RAM in each step: at least"
                f" {most / _BUS:.2f} s over PCI Express 4.0 x8, by its nominal rate (not yet"
                " measured)"
            )
        on = sum(switch.on for switch in self.switches)
        return f"fits, with {on} of the switches" if on else "fits as it is"


def make(loadout: Loadout, work: Work) -> Plan:
    """The plan with the fewest switches that the stages need, in their order."""
    before = stages(loadout, work)
    found = []
    for offer, turned in _OFFERS:
        switch = offer(loadout, work)
        if switch is None:
            continue
        needed = _in_need(switch, loadout, work)
        if needed:
            loadout = turned(loadout)
        found.append(replace(switch, on=needed))
    return Plan(work, before, stages(loadout, work), found, loadout)


def _in_need(switch: Switch, loadout: Loadout, work: Work) -> bool:
    """Whether a switch's stage does not fit where the switch saves."""
    stage = {stage.name: stage for stage in stages(loadout, work)}.get(switch.stage)
    if stage is None:
        return False
    over_ram = stage.ram_peak > work.ram and switch.saves_ram
    return over_ram or stage.streamed > 0 or (work.card is not None and stage.peak > work.room)


# ---- the switches


def _quantize(loadout: Loadout, work: Work) -> Switch | None:
    then = loadout.model.four_bit
    if then is None:
        return None
    return Switch(
        "4-bit model",
        SAMPLE,
        loadout.model.bytes - then.bytes,
        (
            f"{duration(loadout.model.to_quantize * SECONDS_A_WEIGHT)} once, on 2 cores of an AMD"
            " EPYC (Zen 3) with preset fast; on a GPU not yet measured"
        ),
        "SVDQuant Quantize Checkpoint, or python ComfyUI-Nibble quantize",
    )


def _quantized(loadout: Loadout) -> Loadout:
    assert loadout.model.four_bit is not None
    return replace(loadout, model=loadout.model.four_bit)


def _encoder(loadout: Loadout, work: Work) -> Switch | None:
    saved = sum(one.bytes - one.bytes_4 for one in loadout.encoders if one.bytes_4 is not None)
    if saved <= 0:
        return None
    return Switch(
        "text encoder at 4 bits",
        ENCODE,
        saved,
        "the prompt is read a little differently; the encoder's own report says by how much",
        "Quantize Text Encoder, and Load Quantized CLIP in place of the stock loader",
    )


def _encoders_at_4(loadout: Loadout) -> Loadout:
    return replace(loadout, encoders=tuple(map(_at_4, loadout.encoders)))


def _at_4(one: EncoderWeights) -> EncoderWeights:
    if one.bytes_4 is None or one.bytes_4 >= one.bytes:
        return one
    return replace(one, name=f"{one.name}, 4 bit", bytes=one.bytes_4, bytes_4=None)


def _modulation(loadout: Loadout, work: Work) -> Switch | None:
    size = loadout.model.modulation
    if not size or work.card is None:
        return None
    return Switch(
        "modulation in RAM",
        SAMPLE,
        size,
        (
            f"{size * _SECONDS_A_BYTE:.2f} s of a CPU core a step, computed ahead (28 steps, AMD"
            " EPYC); its effect on a GPU's speed is not yet measured"
        ),
        "modulation_in = ram of Load SVDQuant Model",
        saves_ram=False,
    )


def _kept_in_ram(loadout: Loadout) -> Loadout:
    return replace(loadout, in_ram=True)


def _tiles(loadout: Loadout, work: Work) -> Switch | None:
    vae = loadout.vae
    if vae is None or vae.decoder is None:
        return None
    now = {stage.name: stage for stage in stages(loadout, work)}[DECODE]
    then = {stage.name: stage for stage in stages(_in_tiles(loadout), work)}[DECODE]
    saves = now.ram_peak - then.ram_peak if work.card is None else now.peak - then.peak
    if not saves:
        return None
    cost = vae.decoder.tiles_cost(work.size)
    return Switch(
        "tiled VAE",
        DECODE,
        saves,
        f"{cost:.1f} times the pixels are decoded; seams are blended",
        "VAE Decode (Tiled) in place of VAE Decode",
        saves_ram=work.card is None,
    )


def _in_tiles(loadout: Loadout) -> Loadout:
    return replace(loadout, tiled=True)


_Offer = Callable[[Loadout, Work], Switch | None]
_Turn = Callable[[Loadout], Loadout]
_OFFERS: tuple[tuple[_Offer, _Turn], ...] = (
    (_quantize, _quantized),
    (_encoder, _encoders_at_4),
    (_modulation, _kept_in_ram),
    (_tiles, _in_tiles),
)


def gigabytes(size: int) -> str:
    """Bytes for people: 6.59 GB, 7.9 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people, rounded."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
