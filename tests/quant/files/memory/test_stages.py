"""Plans whose numbers are worked out by hand."""

from dataclasses import replace

import pytest

from nibble.quant.files.memory import comfyui, decoders, switches
from nibble.quant.files.memory.comfyui import GIB, MIB
from nibble.quant.files.memory.published import Sampler
from nibble.quant.files.memory.stages import DECODE, ENCODE, SAMPLE, SYSTEM, Loadout, Work, stages
from nibble.quant.files.memory.weights import EncoderWeights, LoraWeights, ModelWeights, VaeWeights

FLUX = Sampler(3.1, (8, 1), 2)
MODEL = ModelWeights("model", 6_600_000_000, FLUX, modulation=1_700_000_000)
ENCODER = EncoderWeights("encoder", 9_800_000_000, 4096, 10240, 10240 * 4096, 2_900_000_000)
VAE = VaeWeights("vae", 80_000_000, decoders.KL)
EIGHT = Work()


def found(loadout: Loadout, work: Work = EIGHT) -> dict:
    return {stage.name: stage for stage in stages(loadout, work)}


# ---- ComfyUI's arithmetic


def test_a_step_of_flux_at_a_megapixel():
    """16384 positions of 2 bytes, 3.1 hundredths of a MiB for each byte."""
    assert comfyui.sampling(3.1, 128 * 128, 2) == int(1015.808 * MIB)


def test_twice_the_bytes_or_positions_take_twice_as_much():
    one = comfyui.sampling(2.0, 1000, 2)
    assert comfyui.sampling(2.0, 1000, 4) == comfyui.sampling(2.0, 2000, 2) == 2 * one


@pytest.mark.parametrize(
    "weights, free, needed, loaded",
    [
        (3 * GIB, 8 * GIB, GIB, 3 * GIB),  # all
        (9 * GIB, 8 * GIB, GIB, 7 * GIB - 400 * MIB),  # what the work leaves
        (9 * GIB, 8 * GIB, 7.5 * GIB, 3.2 * GIB),  # but two fifths of the card in any case
        (9 * GIB, GIB, 0, 0),  # a card that has no room for any work
    ],
)
def test_what_of_the_weights_is_loaded(weights, free, needed, loaded):
    assert comfyui.loaded(weights, free, needed) == pytest.approx(max(0, loaded), abs=2)


def test_frames_of_a_video_count_as_the_vae_joins_them():
    assert comfyui.area((64, 32), 1, (8, 4)) == 8 * 4
    assert comfyui.area((64, 32), 81, (8, 4)) == 21 * 8 * 4


# ---- decoding


def test_decoding_a_megapixel_and_a_tile_of_it():
    whole = 2178 * 128 * 128 * 64 * 2
    assert decoders.KL.bytes(1, (1024, 1024), 2) == whole
    assert decoders.KL.tiled(1, (1024, 1024), 2) == whole // 4
    assert decoders.KL.tiled(1, (512, 256), 2) == decoders.KL.bytes(1, (512, 256), 2)


def test_pictures_are_decoded_in_tiles_of_three_shapes():
    """128 positions are tiles of 64, 64 and 16 that begin 56 apart, or five of 32, or one of 128;
    64 positions are one of 64, or 32, 32 and 16, or one.
    """
    assert decoders.KL.tiles_cost((1024, 1024)) == (144**2 + 2 * 160 * 128) / 128**2
    assert decoders.KL.tiles_cost((512, 512)) == (64**2 + 2 * 80 * 64) / 64**2


def test_videos_are_decoded_in_tiles_of_one_shape_and_64_frames():
    assert decoders.WAN.tiles_cost((1024, 512)) == 144 / 128
    assert decoders.LTX.tiled(20, (512, 512), 2) == decoders.LTX.bytes(8, (512, 512), 2)
    assert decoders.LTX.bytes(20, (512, 512), 2) == 1200 * 20 * 16 * 16 * 512 * 2


# ---- the stages


def test_a_stage_holds_its_own_weights_and_its_work():
    there = found(Loadout(MODEL, (replace(ENCODER, bytes=10**9),), VAE))
    assert list(there) == [ENCODE, SAMPLE, DECODE]
    step = comfyui.sampling(3.1, 128 * 128, 2)
    room = 7 * GIB - step - 400 * MIB
    assert there[SAMPLE].peak == pytest.approx(room + step, abs=2)
    assert there[SAMPLE].streamed == pytest.approx(MODEL.bytes - room, abs=2)
    assert there[DECODE].peak == 160_000_000 + 2178 * 128 * 128 * 64 * 2
    reading = 4 * (6 * 512 * 10240 + 64 * 512**2 * 2 + 10240 * 4096)
    assert there[ENCODE].peak == 10**9 + reading


def test_what_stays_is_no_part_of_the_peak():
    small = replace(MODEL, bytes=10**9)
    stage = found(Loadout(small, (replace(ENCODER, bytes=10**9),), VAE))[SAMPLE]
    assert [(part.label, part.bytes) for part in stage.card if part.kind == "stays"] == [
        ("encoder", 10**9)
    ]
    assert stage.peak == 10**9 + comfyui.sampling(3.1, 128 * 128, 2)


def test_modulation_in_ram_leaves_the_card_and_not_the_ram():
    there = found(Loadout(MODEL, in_ram=True))[SAMPLE]
    assert not there.streamed
    assert there.card[0].bytes == MODEL.bytes - MODEL.modulation
    beside = found(Loadout(MODEL))[SAMPLE]
    assert there.ram_peak == beside.ram_peak + MODEL.modulation


def test_loras_are_loaded_beside_the_model():
    lora = LoraWeights("lora", 200_000_000, 16)
    small = replace(MODEL, bytes=10**9)
    one, two = found(Loadout(small))[SAMPLE], found(Loadout(small, loras=(lora, lora)))[SAMPLE]
    assert two.peak - one.peak == two.ram_peak - one.ram_peak == 400_000_000


def test_the_kernels_scratch_counts_tokens_of_picture_and_prompt():
    """64 x 64 tokens and 512 of the prompt; 1024 inputs of a byte, 16 scales of 4 bytes, and a
    branch of rank 32 for each 128 columns.
    """
    small = replace(MODEL, bytes=10**9, widest=1024, rank=32)
    stage = found(Loadout(small))[SAMPLE]
    scratch = next(part.bytes for part in stage.card if part.label == "4-bit kernels")
    assert scratch == (64 * 64 + 512) * (1024 + 64 + 128 + 1024)


def test_on_a_cpu_everything_is_in_ram_and_of_four_bytes():
    there = found(Loadout(MODEL, (), VAE), replace(EIGHT, card=None))
    assert there[SAMPLE].card == ()
    weights = MODEL.bytes + 4 * VAE.numbers
    # a step takes twice as much as on a GPU, decoding a picture half of ComfyUI's estimate
    step = 2 * comfyui.sampling(3.1, 128 * 128, 4)
    assert there[SAMPLE].ram_peak == 900_000_000 + weights + step
    assert there[DECODE].ram_peak == 900_000_000 + weights + 2178 * 128 * 128 * 64 * 2


def test_a_cpu_decodes_videos_in_what_comfyui_sets_aside():
    loadout = Loadout(MODEL, (), VaeWeights("vae", 1, decoders.WAN))
    work = Work(size=(512, 256), frames=5, card=None)
    part = found(loadout, work)[DECODE].ram[-1]
    assert part.bytes == 2200 * 32 * 64 * 64 * 4


def test_batch_and_references_multiply_the_step():
    def step(**changes):
        stage = found(Loadout(replace(MODEL, bytes=1)), replace(EIGHT, **changes))[SAMPLE]
        return next(part.bytes for part in stage.card if part.label == "a step")

    assert step(pictures=2) == step(references=1) == 2 * step()


# ---- the switches


def test_a_plan_turns_on_what_it_needs_and_no_more():
    plan = switches.make(Loadout(MODEL, (ENCODER,), VAE), EIGHT)
    assert [(switch.name, switch.on) for switch in plan.switches] == [
        ("text encoder at 4 bits", True),
        ("modulation in RAM", True),
        ("tiled VAE", False),
    ]
    assert plan.peak <= EIGHT.card - SYSTEM
    assert plan.verdict == "fits, with 2 of the switches"


def test_a_16_bit_model_is_quantized_first():
    dense = replace(
        MODEL, bytes=24_000_000_000, modulation=0, to_quantize=12 * 10**9, four_bit=MODEL
    )
    plan = switches.make(Loadout(dense), EIGHT)
    assert [switch.name for switch in plan.switches if switch.on] == [
        "4-bit model",
        "modulation in RAM",
    ]
    assert plan.switches[0].saves == 24_000_000_000 - MODEL.bytes
    assert plan.switches[0].costs.startswith("13 minutes once")  # 12e9 * 803 s / 11.9e9


def test_a_large_card_needs_none():
    plan = switches.make(Loadout(MODEL, (ENCODER,), VAE), Work(card=24 * GIB, ram=32 * 10**9))
    assert not any(switch.on for switch in plan.switches)
    assert plan.verdict == "fits as it is"


def test_little_ram_asks_for_a_smaller_encoder_and_not_for_modulation_in_ram():
    work = Work(card=24 * GIB, ram=16 * 10**9)
    plan = switches.make(Loadout(MODEL, (ENCODER,), VAE), work)
    assert [switch.name for switch in plan.switches if switch.on] == ["text encoder at 4 bits"]
    assert plan.ram_peak < 16 * 10**9


def test_large_pictures_are_decoded_in_tiles():
    plan = switches.make(Loadout(replace(MODEL, bytes=10**9), (), VAE), Work(size=(2048, 1024)))
    tiles = next(switch for switch in plan.switches if switch.name == "tiled VAE")
    assert tiles.on
    assert tiles.saves == 2178 * 64 * 2 * (128 * 256 - 64 * 64)
    # 256 positions in tiles of 64 cover 64 * 4 + 32, in those of 32 and 128 32 * 10 + 16 and 288
    covered = 288 * 144 + 336 * 128 + 272 * 160
    assert tiles.costs.startswith(f"{covered / (256 * 128):.1f} times")


def test_what_does_not_fit_is_said():
    huge = Work(size=(8192, 8192))
    assert "does not fit: sample takes" in switches.make(Loadout(MODEL), huge).verdict
    streams = switches.make(Loadout(replace(MODEL, modulation=0)), EIGHT).verdict
    assert "come from RAM in each step" in streams
    poor = Work(card=24 * GIB, ram=8 * 10**9)
    assert "needs more RAM: 9.60 GB of 8.00 GB" in switches.make(Loadout(MODEL), poor).verdict
