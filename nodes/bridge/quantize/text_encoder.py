"""The request of Quantize Text Encoder: the file in models/text_encoders, what its layers read
while the 16-bit encoder encodes prompts, the 4-bit file beside it, and how close its conditioning
is.

    request.run()  →  SVDQuantJob.prepare    the plan, and one look at the target
                      record                 preset best: the 16-bit encoder on the prompts
                      write                  quantize
                      compare                both encoders on prompts that nothing was fitted to
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import torch

from ....quant.calibration.pictures import is_held_out
from ....quant.calibration.recorder import Shown, collect, find_linears
from ....quant.calibration.statistics import InputStats
from ....quant.files.errors import FileRefused
from ....quant.files.report import Report
from ....quant.files.source import Source
from ....quant.files.text_encoders import family_of
from ....quant.job.measurement import Measurement
from ....quant.svdquant.quantize import SVDQuantJob
from ..host import file_names, folders
from ..host.progress import Progress
from ..quantized import encoders
from ..quantized.encoders import FOLDER
from .job import new_name, watched
from .prompts import OWN
from .record_inputs import fits_in_memory

_GGUF = ".gguf"
_WEIGHTS_ALONE = {"kind": "weights only"}
# how ComfyUI calls what files of vision-language models call otherwise
_RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))
IN_GGUF = (
    "{name} is a GGUF file, which ComfyUI cannot run as a text encoder, and the preset 'best' has"
    " to run it; choose 'fast', which reads the weights alone, or the same encoder as .safetensors."
)
TOO_LARGE = (
    "{name} in 16 bit does not fit in memory, and the preset 'best' has to run it; choose 'fast',"
    " which reads the weights alone, or quantize on a machine with more memory."
)


@dataclass(frozen=True)
class Closeness:
    """Of the conditioning to that of 16 bit, on prompts that nothing was fitted to. cosine: mean
    over tokens; db: signal to noise over all of it.
    """

    cosine: float
    db: float
    prompts: int

    def in_words(self) -> str:
        return (
            f"cosine {self.cosine:.4f}, {self.db:.1f} dB to 16 bit, on {self.prompts} prompts that"
            " nothing was fitted to"
        )


def closeness(plain: list[torch.Tensor], other: list[torch.Tensor]) -> Closeness:
    """Of conditionings (…, tokens, width), a pair for each prompt."""
    pairs = [(a.float().cpu(), b.float().cpu()) for a, b in zip(plain, other, strict=True)]
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]
    signal = sum(a.square().sum(dtype=torch.float64) for a, _ in pairs)
    noise = sum((a - b).square().sum(dtype=torch.float64) for a, b in pairs)
    db = (10 * (signal / noise).log10()).item() if noise else float("inf")
    return Closeness(torch.cat(cosines).mean().item(), db, len(pairs))


@dataclass
class Encoded:
    """What a run found out about the encoder at work. plain: the 16-bit conditioning of the prompts
    to judge by; statistics: of the layers' inputs.
    """

    plain: list[torch.Tensor] = field(default_factory=list)
    statistics: dict[str, InputStats] = field(default_factory=dict)


@dataclass(kw_only=True)
class TextEncoderRequest:
    """What the user asked for. prompts: a line each, none: Nibble's own; kind: the type of
    CLIPLoader, or "auto".
    """

    clip_name: str
    recipe: Any
    filename: str = ""
    overwrite: bool = False
    kind: str = "auto"
    prompts: tuple[str, ...] = ()
    memory_gb: float = 4.0
    node_id: str | None = None

    def run(self) -> tuple[str, Report, Closeness | None]:
        """Quantizes; returns the new file's name, the report, and how close its conditioning is
        (None where the 16-bit encoder cannot be run). Raises FileRefused and ValueError.
        """
        source = Source(folders.path_of(self.clip_name, FOLDER))
        origin = file_names.without(self.clip_name, _GGUF)
        wanted = new_name(origin, self.filename, self.ending, FOLDER)
        with folders.new_file(wanted, FOLDER, self.overwrite, beside=source.path) as new:
            job = SVDQuantJob.prepare(source, new.held, self.recipe)
            self._check(job)
            try:
                report, encoded = self._made(job, new.name)
            finally:
                comfy.model_management.soft_empty_cache()
        folders.refresh(FOLDER)
        return new.name, report, self._compared(new.name, encoded)

    @property
    def ending(self) -> str:
        """What is added to the source's name where the user gave none."""
        return "w4a8" if self.recipe.format == "svdquant_w4a8" else "w4a16"

    @property
    def calibrated(self) -> bool:
        """Whether the 16-bit encoder is watched."""
        return self.recipe.preset == "best"

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, of which some are kept to judge by."""
        return self.prompts or OWN

    @property
    def judges(self) -> list[str]:
        """Those prompts; a single one stands for itself."""
        held = is_held_out(torch.arange(len(self.texts)), len(self.texts))
        return [text for text, out in zip(self.texts, held, strict=True) if out] or list(self.texts)

    def _check(self, job: SVDQuantJob) -> None:
        if family_of(job.source.shapes) is None:
            raise FileRefused(
                f"{self.clip_name} is a diffusion model ({job.architecture}) and no text encoder:"
                " it belongs in models/diffusion_models, where SVDQuant Quantize Checkpoint takes"
                " it."
            )
        if self.calibrated and not job.source.is_one_file:
            raise ValueError(IN_GGUF.format(name=self.clip_name))
        if self.calibrated and not fits_in_memory(job.source.bytes):
            raise ValueError(TOO_LARGE.format(name=self.clip_name))

    def _made(self, job: SVDQuantJob, name: str) -> tuple[Report, Encoded]:
        provenance = dict(_WEIGHTS_ALONE)
        if self.calibrated:
            digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
            provenance = {"kind": "prompts", "prompts": len(self.texts), "sha256": digest}
        made = job.existing_report(provenance)
        if made is None and job.target.exists() and not self.overwrite:
            raise FileRefused(
                f"{name} exists already and was made with other options; switch 'overwrite' on, or"
                " give another filename."
            )
        encoded = Encoded()
        if job.source.is_one_file and fits_in_memory(job.source.bytes):
            encoded = self._encoded([] if made else job.quantized_names)
        if made is not None:
            return made, encoded
        report = job.write(
            Measurement(provenance, encoded.statistics.get),
            watched(self.node_id),
            comfy.model_management.get_torch_device(),
        )
        return report, encoded

    def _encoded(self, names: list[str]) -> Encoded:
        """The 16-bit encoder at work."""
        clip, _ = encoders.load([self.clip_name], self.kind)
        found = Encoded(plain=[encode(clip, text) for text in self.judges])
        if self.calibrated and names:
            found.statistics = self._record(clip, names)
        comfy.model_management.unload_all_models()
        return found

    def _record(self, clip: Any, names: list[str]) -> dict[str, InputStats]:
        progress = Progress("measuring", self.node_id, unit="step")
        state = {"prompt": 0, "pass": 0}

        def run() -> None:
            for number, text in enumerate(self.texts):
                state["prompt"] = number
                progress(number, len(self.texts), f"pass {state['pass'] + 1}")
                encode(clip, text)
            state["pass"] += 1

        transformer, module_of = layers_of(clip, names)
        return collect(
            transformer,
            names,
            run,
            int(self.memory_gb * 1e9),
            seed=self.recipe.seed,
            shown=Shown(len(self.texts), lambda: range(state["prompt"], state["prompt"] + 1)),
            module_of=module_of,
        )

    def _compared(self, name: str, encoded: Encoded) -> Closeness | None:
        if not encoded.plain:
            return None
        clip, _ = encoders.load([name], self.kind, verify=False)
        return closeness(encoded.plain, [encode(clip, text) for text in self.judges])


def encode(clip: Any, text: str) -> torch.Tensor:
    """The conditioning of a prompt, (1, tokens, width)."""
    return clip.encode_from_tokens(clip.tokenize(text))


def layers_of(clip: Any, names: list[str]) -> tuple[torch.nn.Module, Callable[[str], str]]:
    """The transformer that has a file's layers, and what it calls each. Raises FileRefused where
    ComfyUI builds none of them.
    """

    def module_of(name: str) -> str:
        for file, model in _RENAMED:
            if name.startswith(file):
                return model + name.removeprefix(file)
        return name

    for part in clip.cond_stage_model.modules():
        if isinstance(part, comfy.sd1_clip.SDClipModel):
            linears = find_linears(part.transformer)
            if all(module_of(name) in linears for name in names):
                return part.transformer, module_of
    raise FileRefused(
        "ComfyUI builds another encoder of this file than its tensors say; choose its type, as in"
        " CLIPLoader."
    )


def sources() -> list[str]:
    """Files that can be quantized: ComfyUI's text encoders that Nibble did not make."""
    made = set(encoders.quantized_files())
    plain = [name for name in folders.names(FOLDER) if name not in made]
    return plain + folders.every_name(FOLDER, _GGUF)
