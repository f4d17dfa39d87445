"""A tiny model of every family, quantized and loaded as an artist does: the walk through every
class.

    path = quantized("wan 2.1", folder)     its 4-bit file
    model = load("wan 2.1", path, patch)    that file by Nibble's loader
    EVERY                                   parameters of a test: every family; all but KINDS slow
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import folder_paths
import pytest
import torch

import tiny_models
from nibble.quant.files import universal_plan
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import StateDictSource
from nibble.quant.svdquant.quantize import SVDQuantJob
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.vq4dit import quantize as vq4dit
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe
from tiny_more_families import WIDER

TINY = Recipe.from_preset("fast", rank=16, solver="svd", smoothing_grid=1)
VQ_3 = VQRecipe.from_preset("fast", bits=3)
FAMILIES = tiny_models.FAMILIES | WIDER
LORA = "style.safetensors"
# one of each kind, which every run of the tests walks; --slow walks through all
KINDS = {
    "flux",  # two streams of tokens that become one
    "qwen-image",  # two streams
    "z-image",  # one stream, behind refiners
    "wan 2.1",  # cross-attention, a video
    "cosmos predict 2",  # modulation of low rank, no gradient
    "sdxl",  # a U-Net
    "pixeldit",  # pixels in place of latents
    "omnigen 2",  # layers that no group divides
    "minimax h3",  # latents of several streams
    "hidream o1",  # a language model
    "hunyuan 3d 2.1",  # a mixture of experts, latents without width and height
    "ace-step 1",  # sound, and convolutions
}
EVERY = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny_models.FAMILIES
]


def widen(patch: pytest.MonkeyPatch) -> None:
    """For the length of a test: families with layers that groups of 64 divide, and no layer too
    small for a guessed plan.
    """
    patch.setattr(universal_plan, "LEAST", 1)
    for name, family in WIDER.items():
        patch.setitem(tiny_models.FAMILIES, name, family)


def state(model) -> dict[str, torch.Tensor]:
    weights = model.model.diffusion_model.state_dict()
    saved = model.model.state_dict_for_saving({})
    weights |= {key: value for key, value in saved.items() if key.startswith("conditioner.")}
    return {key: value.contiguous() for key, value in weights.items()}


def quantized(name: str, folder: Path, method: str = "svdquant") -> Path:
    """A family's file in this folder, made if it is not there. Needs `widen`."""
    path = folder / f"{name.replace(' ', '-')}-{method}.safetensors"
    if not path.exists():
        source = StateDictSource(state(tiny_models.build(name)))
        if method == "svdquant":
            SVDQuantJob.prepare(source, path, TINY).write()
        else:
            vq4dit.quantize_checkpoint(source, path, VQ_3)
    return path


def load(name: str, path: Path, patch: pytest.MonkeyPatch, **options):
    """The file by Nibble's loader; ComfyUI's detection, which knows published widths alone, is told
    the tiny ones.
    """
    from nibble.nodes.bridge.quantized import loading

    family = tiny_models.FAMILIES[name]

    def told(*_args, **_kwargs):
        config = getattr(comfy.supported_models, family.config)(dict(family.options))
        config.unet_config.update(family.options)
        return config

    for part in family.parts():
        patch.setattr(*part)
    patch.setattr(comfy.model_detection, "model_config_from_unet", told)
    patch.setattr(type(told()), "process_unet_state_dict", lambda self, state: state)
    return loading.load(path, dtype="fp32", **options)


def dense(name: str):
    """The 16-bit model, which ComfyUI can load a second time."""
    model = tiny_models.build(name)
    model.cached_patcher_init = (_again, (name,))
    return model


def _again(name: str, disable_dynamic: bool = False):
    return dense(name)


def draw(model, name: str, steps: int = 1):
    return tiny_models.sample(model, name, steps=steps)


def relative(found, wanted) -> float:
    """|found - wanted| / |wanted| of latents of one or several streams."""
    found, wanted = (
        torch.cat([part.flatten() for part in (value.unbind() if value.is_nested else [value])])
        for value in (found, wanted)
    )
    return ((found - wanted).norm() / wanted.norm()).item()


def linears(model) -> dict[str, torch.nn.Module]:
    """Name → Linear of a diffusion model."""
    return {
        name: module
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
    }


def lora_tensors(sixteen, only: set[str] | None = None) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 for these linears of a 16-bit model (None: all), a third as large as their
    weights, under the names of ComfyUI's own training.
    """
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, module in linears(sixteen).items():
        n, k = module.weight.shape
        size = module.weight.float().norm().item() / (n * k) ** 0.5
        up, down = torch.randn(n, 4, generator=generator), torch.randn(4, k, generator=generator)
        if only is None or name in only:
            tensors[f"diffusion_model.{name}.lora_up.weight"] = up * size / 6
            tensors[f"diffusion_model.{name}.lora_down.weight"] = down
    return tensors


def with_lora(model, tensors: dict[str, torch.Tensor], strength: float = 1.0):
    """As Load LoRA (Model Only) does."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def put_folders(kinds: list[str], root: Path, patch: pytest.MonkeyPatch) -> None:
    """ComfyUI's folders of these kinds, empty, under `root`."""
    for kind in kinds:
        (root / kind).mkdir(exist_ok=True)
        patch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(root / kind)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    patch.setattr(folder_paths, "output_directory", str(root / "output"))


def refusal(work) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises((ValueError, FileRefused)) as refused:
        work()
    sentence = str(refused.value)
    assert sentence
    assert "\n" not in sentence
    return sentence
