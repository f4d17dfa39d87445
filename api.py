"""The front door for scripts: `nibble.quantize`, `nibble.load`, `nibble.inspect`, `nibble.cache`.

    import nibble

    report = nibble.quantize("flux1-dev.safetensors", "flux1-dev-svdq.safetensors")
    transformer = nibble.load("flux1-dev-svdq.safetensors")
    nibble.inspect("flux1-dev-svdq.safetensors")["kind"]
    nibble.cache(pipe)

docs/api.md is made of the docstrings here, by `python tests/support/api_page.py`.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from .accel.caching.calibration_file import Calibration
    from .accel.diffusers import Caching
    from .quant.files.report import Report


_PROJECT = Path(__file__).parent / "pyproject.toml"


def version() -> str:
    """`nibble.__version__`: as pyproject.toml has it, that of this folder or of what pip
    installed.
    """
    if _PROJECT.is_file():
        found = re.search(r'^version = "(.+)"$', _PROJECT.read_text(encoding="utf-8"), re.M)
        assert found, f"{_PROJECT} has no version"
        return found[1]
    from importlib import metadata

    return metadata.version("nibble")


def quantize(  # noqa: PLR0913 (a script's keywords)
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    method: str = "svdquant",
    preset: str = "fast",
    device: str = "cpu",
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Report:
    """Makes the quantized file `target` of the model `source`, as the command `quantize` does.

    source     a diffusion model or a text encoder: a .safetensors or .gguf file, one of several
               files or their index, or a folder that diffusers saved
    method     "svdquant" (4-bit weights and activations), "vq" (codebooks of 2 to 4 bits a weight)
               or "stock" (formats that ComfyUI opens without Nibble)
    preset     "fast" (data-free), "best" (calibrated; outside ComfyUI for FLUX.1 and DiT) or
               "vq4dit"
    device     where layers are worked on, as torch names it
    overwrite  replace a quantized file that was made with other options or of another model
    quiet      no progress bar on stderr
    options    any other of `nibble quantize --help`, with underscores: rank=64, bits=3,
               prompts="prompts.safetensors", keep=["double_blocks.0.*"], memory_cap=8.0 (GB);
               part="2/4" makes the second of four ranges of layers, in a file of its own, and
               parts=4 joins the four into `target`, which has the bytes of one run ("fast" alone)

    Returns the report: `rows` (a row a layer: name, action, dB), `bytes_before`, `bytes_after`,
    `summary()`. The same call again returns at once; an interrupted one goes on.
    Raises FileRefused (a ValueError) for a file that cannot be used, ValueError for options that
    cannot, TypeError for an option that there is not; nothing has been written then.
    """
    from .quant.cli import by_name
    from .quant.cli import quantize as command

    chosen = {"method": method, "preset": preset, "device": device, "overwrite": overwrite}
    return command.run(by_name.for_quantize(source, target, chosen | {"quiet": quiet} | options))


def load(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, train: bool = False
) -> torch.nn.Module:
    """A quantized FLUX.1 file (Nibble's of either method, Nunchaku's or comfy-kitchen's), or
    Nibble's of DiT, SANA or SDXL, as diffusers' transformer or U-Net on the CPU, for
    `FluxPipeline(transformer=...)`; layers stay quantized. LoRAs go beside them
    (`load_lora_weights`, with peft), `save_pretrained` writes them.

    dtype  of what the file keeps in 16 bit; None: bfloat16
    train  make the low-rank factors and biases of quantized layers parameters

    Raises FileRefused for a file that is damaged or of another model, ImportError where diffusers
    cannot be used.
    """
    import torch

    return _diffusers("load").load_quantized(path, dtype or torch.bfloat16, train)


def cache(  # noqa: PLR0913 (a script's keywords)
    pipe: Any,
    rule: str = "error",
    *,
    preset: str = "balanced",
    threshold: float | None = None,
    budget: int | None = None,
    alpha: float = 0.1,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    coefficients: str | Sequence[float] = "auto",
    order: int | None = None,
    first: int = 1,
    last: int = 1,
    scheduler: Any = None,
) -> Caching:
    """Steps or layers that a pipeline of diffusers need not compute, by the rules of the nodes. The
    hooks are diffusers' own.

    pipe       a pipeline with a `transformer` (and `transformer_2`), or a transformer alone with
               its `scheduler`
    rule       "error": whole steps, while their predicted errors add up to less than `threshold`
               (any model, no calibration); "budget": so many whole steps, evenly spread, or placed
               by a calibration; "smoothcache": attention and feed-forward layers, each kind by a
               schedule of a calibration (arXiv 2411.10510); "teacache": all blocks as one, while
               the change of the first one's input, by a published polynomial, adds up to less than
               `threshold` (arXiv 2411.19108; FLUX, HunyuanVideo, Qwen-Image, LTX-Video, CogVideoX
               and Wan, of the sizes that were fitted)
    preset     of "error" and "teacache": "quality", "balanced" or "fast", unless a `threshold` is
               given
    budget     steps that are computed
    alpha      of "smoothcache": the relative error that reusing a layer's result may make
    calibration  what `calibrate_cache` returned, or its file
    coefficients  of "teacache": "auto", "plain" for the second of Wan 2.1's two sets, or your own,
               the highest power first
    order      a skipped result is the last one (0), on the line (1) or parabola (2) through the
               last ones; by default 1, or by weights that were fitted on the calibration
               where "budget" has one of a flow's same schedule; with "teacache" 0, as published
    first, last  steps at either end that are always computed

    Returns the caching: `record` of the last picture (computed, reused, work), and `remove()`,
    which a `with` does by itself. A second call replaces the first.
    Raises ValueError for what cannot be, FileRefused for another model's calibration.
    """
    accel = _accel("cache")
    from .accel.caching import calibration_file
    from .accel.caching.steps import Window

    if isinstance(calibration, (str, os.PathLike)):
        calibration = calibration_file.read(Path(calibration))
    return accel.cache(
        pipe,
        rule,
        preset=preset,
        threshold=threshold,
        budget=budget,
        alpha=alpha,
        calibration=calibration,
        coefficients=coefficients,
        order=order,
        window=Window(first=first, last=last),
        scheduler=scheduler,
    )


def calibrate_cache(
    pipe: Any, calls: Sequence[Mapping[str, Any]], *, name: str = "", farthest: int = 3
) -> Calibration:
    """Draws pictures without a cache, and learns what may be reused: errors of each kind of layer,
    and of whole steps.

    pipe      a pipeline with a `transformer`
    calls     the arguments of each picture: [{"prompt": "a fox", "num_inference_steps": 28}, ...]
    name      of the model, for messages; by default its class
    farthest  steps that a result may be kept at most

    Returns the calibration; its `save(Path("model.json"))` writes the file that the nodes write,
    too. Raises ValueError for fewer steps than `farthest` + 2.
    """
    return _accel("calibrate_cache").calibrate(pipe, calls, name, farthest)


def _accel(name: str) -> Any:
    from .kernels.optional import optional

    accel, why = optional(".accel.diffusers", __package__)
    if accel is None:
        raise ImportError(f"nibble.{name} needs diffusers, and {why}; pip install -U diffusers")
    return accel


def __getattr__(name: str) -> Any:
    """`NibbleConfig`, a name that imports diffusers and enters the quantizer in its tables."""
    if name != "NibbleConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _diffusers(name).NibbleConfig


def _diffusers(name: str) -> Any:
    from .kernels.optional import optional
    from .quant.svdquant.one_layer import DataFree

    diffusers, why = optional(".quant.diffusers", __package__)
    if diffusers is None:
        raise ImportError(f"nibble.{name} needs diffusers, and {why}; pip install -U diffusers")
    diffusers.register(DataFree)
    return diffusers


def inspect(path: str | os.PathLike[str], verify: bool = False) -> dict[str, Any]:
    """What any model file or folder is, as `nibble inspect --json` prints it.

    verify  read all of a file of Nibble's and compare it with its checksums

    Returns `file` and `kind` (a line for people); of a quantized file `format`, `method`, `layers`
    (name → facts), `source`, `recipe`, `calibration` and `report`; of a model that can be quantized
    `architecture`, `weights`, `bytes` and `layers` (their number).
    Raises FileRefused for a file that is missing or damaged.
    """
    from .quant.cli import inspect as command

    return command.facts(
        argparse.Namespace(file=os.fspath(path), verify=verify, small_file=small_file)
    )


def small_file(path: Path, verify: bool) -> dict | None:
    """What a file of Nibble's own is that holds no model (an adapter, couplings, a state, a
    calibration) or a part of one, for `inspect`; None for any other. It is read whole, couplings
    and parts where `verify` asks for it. Raises FileRefused for a damaged one.
    """
    from .accel.caching import calibration_file as caching
    from .accel.caf import inspect as caf
    from .quant.files import part_files, small, source_files
    from .quant.intlora import file as intlora
    from .quant.training import state

    if path.name.endswith(source_files.INDEX):
        return None
    if path.is_dir() or path.suffix == ".json":
        return caf.couplings_facts(path, verify) or caching.facts(path)
    kind = small.format_of(path)
    if kind == part_files.FORMAT:
        return part_files.facts(path, verify)
    if kind == "intlora":
        adapter = intlora.read(path)
        return {"file": path.name, "kind": "IntLoRA adapter", "layers": len(adapter.layers)}
    if kind == state.FORMAT:
        steps = len(state.State(path).losses)
        return {"file": path.name, "kind": "state of a training", "steps": steps}
    return caf.facts(path, kind)
