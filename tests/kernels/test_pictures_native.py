"""End to end: the demo model, at 4 bits, draws the same picture through the compiled kernels as
through plain torch, and the same one every time.
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="the demo needs diffusers")

from nibble.demo import metrics, pictures, prompts  # noqa: E402
from nibble.kernels import which  # noqa: E402
from nibble.kernels.backends import native  # noqa: E402
from nibble.quant import diffusers as models  # noqa: E402
from nibble.quant.svdquant.quantize import quantize_checkpoint  # noqa: E402
from nibble.quant.svdquant.recipe import Recipe  # noqa: E402
from plain import plain_torch  # noqa: E402

PROMPTS, SEEDS, STEPS = 2, range(2), 12
QUICK = Recipe.from_preset("fast", solver="svd", smoothing_grid=1, clip_search=False)
TOGETHER, EACH = 45.0, 40.0
"""dB between two ways to compute the same model: over all pictures, and for the worst. A value on
the border of two codes may round either way (sums run in another order), and twelve steps carry
that on. Over 20 pictures the median was 56 dB and the worst 46; 4 bits against 16 gave 48.
"""

module, reason = native.module()
needs_module = pytest.mark.skipif(module is None, reason=f"{reason}: pip install ./kernels")


def assert_close(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    each = metrics.psnr(drawn, expected)
    together = metrics.psnr(drawn.flatten(0, 1)[None], expected.flatten(0, 1)[None])
    assert together >= TOGETHER and each.min() >= EACH, (
        f"{together.item():.1f} dB together, {each.tolist()}"
    )


def draw(flux, device: str = "cpu") -> torch.Tensor:
    """Pictures (PROMPTS * SEEDS, 64, 64, 3), decoded on the CPU."""
    asked = [prompt for prompt in prompts.SCORED[:PROMPTS] for _ in SEEDS]
    noise = torch.stack(
        [
            torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed))
            for _ in range(PROMPTS)
            for seed in SEEDS
        ]
    )
    words = (tensor.to(device) for tensor in prompts.embed(prompts.word_indices(asked)))
    latents = models.euler(flux.to(device), noise.to(device), *words, STEPS, 3.5, pictures.SHIFT)
    return pictures.decode(pictures.load_vae(), latents.cpu())


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The demo FLUX at 4 bits through the file and back, quantized in the least time: the kernels
    do not care how well.
    """
    target = tmp_path_factory.mktemp("pictures") / "demo.safetensors"
    quantize_checkpoint(pictures.FLUX_FILE, target, QUICK)
    return models.load_quantized(target, torch.float32)


@pytest.fixture(scope="module")
def reference_pictures(flux):
    with plain_torch():
        assert which("linear_w4a4", "cpu", torch.float32)[0] == "reference"
        return draw(flux)


@needs_module
def test_the_compiled_kernels_draw_the_reference_picture(flux, reference_pictures):
    assert which("linear_w4a4", "cpu", torch.float32)[0] == "native"
    assert_close(draw(flux), reference_pictures)


@needs_module
def test_the_same_seed_gives_the_same_picture_with_any_number_of_threads(flux, monkeypatch):
    first = draw(flux)
    assert torch.equal(first, draw(flux))
    for threads in (1, 3):
        # The compiled ops read the count here; torch's own pool keeps its size, so nothing else
        # changes.
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(first, draw(flux)), f"{threads} threads"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device in this machine")
def test_a_gpu_draws_the_reference_picture_and_the_same_one_twice(flux, reference_pictures):
    try:
        drawn = draw(flux, "cuda")
        assert_close(drawn, reference_pictures)
        assert torch.equal(drawn, draw(flux, "cuda"))
    finally:
        flux.to("cpu")
