"""VQ's quantize request: as every method's (`job`), and where the recipe calibrates, the 16-bit
model at work inside ComfyUI as the teacher.

Zero-data calibration follows the sampler's own trajectory (VQ4DiT, Deng et al., 2024,
arXiv:2408.17131, section 3.3): ComfyUI samples with the model from noise, under random conditioning
or the user's prompts, and every call of the diffusion model is recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ....quant.calibration.pictures import ON_NOISE, ON_NOISE_CALIBRATED, TEACHER_PROMPTS
from ....quant.calibration.teacher import Teacher
from ....quant.files.report import Report
from ....quant.job.checkpoint_run import QuantizeJob
from ....quant.job.measurement import Measurement
from ....quant.job.monitor import Monitor
from ....quant.vq4dit.quantize import VQJob
from ....quant.vq4dit.recipe import Recipe
from ..host.progress import Progress
from ..host.samplers import in_training
from . import record_inputs
from .charts import LiveBlocks
from .job import QuantizeRequest
from .record_inputs import NotMeasured, Pictures, Recording

_ZERO_IS_PRESET = ("codewords", "vector", "candidates", "steps", "budget_gb")


@dataclass(kw_only=True)
class VQRequest(QuantizeRequest):
    """What the user asked for."""

    method = VQJob
    memory_gb: float = 2.0

    @property
    def ending(self) -> str:
        size = f"{self.recipe.bits}"
        if self.recipe.codewords is not None:
            size = f"-k{self.recipe.codewords}d{self.recipe.vector}"
        return f"vq{size}-{self.recipe.preset}"

    @property
    def noise_note(self) -> str:
        if self.recipe.calibrated:
            return ON_NOISE_CALIBRATED
        return ON_NOISE

    @property
    def reads_inputs(self) -> bool:
        return self.recipe.turns > 0

    def existing_report(self, job: QuantizeJob) -> Report | None:
        # a calibration depends on what is drawn, which only the model can tell
        return None if self.recipe.calibrated else super().existing_report(job)

    def random_pictures(self, patcher: ModelPatcher) -> Pictures | NotMeasured:
        if not self.recipe.calibrated:
            return super().random_pictures(patcher)
        return record_inputs.random_pictures(
            patcher, self.recipe.seed, TEACHER_PROMPTS, self.steps, self.latent
        )

    def provenance(self, recording: Recording | NotMeasured) -> dict:
        provenance = super().provenance(recording)
        if not self.recipe.calibrated:
            return provenance
        if isinstance(recording, NotMeasured):
            raise ValueError(
                f"The preset {self.recipe.preset!r} watches the 16-bit model while it samples, but"
                f" {recording.reason}. Connect 'positive' (and 'model'), or choose the preset"
                " 'fast'."
            )
        return provenance | {"cap_gb": self.memory_gb}

    def write(
        self, job: QuantizeJob, recording: Recording | NotMeasured, provenance: dict
    ) -> Report:
        if not self.recipe.calibrated or isinstance(recording, NotMeasured):
            return super().write(job, recording, provenance)
        self.note(job, recording)
        progress = Progress("calibrating", self.node_id, unit="layer", resumes=True)
        bar = Progress("drawing", self.node_id, unit="step")
        live = LiveBlocks(
            job.target.stem, f"{self.recipe.preset}, {self.recipe.bits} bits", progress
        )
        patcher = recording.patcher
        teacher = Teacher(
            patcher.model.diffusion_model,
            lambda: record_inputs.draw(recording, _counted(recording.pictures, bar)),
            cap=self.memory_cap,
            device=patcher.load_device,
        )
        try:
            with in_training():
                return job.write(
                    Measurement(provenance, teacher=teacher),
                    Monitor(live.start, progress.heed, live, progress.count),
                    patcher.load_device,
                )
        finally:
            comfy.model_management.unload_all_models()


def recipe_of(preset: str, bits: int, rotation: bool = False, **choices) -> Recipe:
    """A recipe from a node's inputs, where 0 stands for the preset's own. Raises ValueError in
    plain words.
    """
    for name in _ZERO_IS_PRESET:
        choices[name] = choices.get(name) or None
    return Recipe.from_preset(preset, bits=bits, rotation=64 if rotation else None, **choices)


def _counted(pictures: Pictures, progress: Progress) -> Callable:
    """A sampler's callback that moves the bar over all pictures' steps."""
    total = len(pictures.prompts) * pictures.steps
    steps_done = 0

    def count(*_) -> None:
        nonlocal steps_done
        steps_done += 1
        progress(min(steps_done, total), total, "with the 16-bit model")

    return count
