"""A quantize node's work: find source and target, prepare, measure what the layers read, write,
leave memory as it was.

    request.run()  →  QuantizeJob.prepare      the plan, and one look at the target
                      existing report?         done already: nothing is loaded
                      recording                the 16-bit model and what to draw with it, or why not
                      existing report?         done already with this measurement
                      write                    measure, then quantize
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ....quant.calibration.pictures import ENOUGH_PROMPTS, ON_NOISE, few_prompts
from ....quant.calibration.recorder import find_linears
from ....quant.calibration.statistics import InputStats
from ....quant.files import architectures, text_encoders
from ....quant.files.errors import FileRefused
from ....quant.files.report import Report
from ....quant.files.source import Source, StateDictSource
from ....quant.job.checkpoint_run import QuantizeJob
from ....quant.job.measurement import Measurement
from ....quant.job.monitor import Monitor
from ..host import file_names, folders
from ..host.progress import Progress
from ..quantized.loading import FOLDER
from . import prompts, record_inputs, sources
from .patched_weights import PatchedWeights, metadata_of
from .record_inputs import DrawingFailed, NotMeasured, Recording

log = logging.getLogger("nibble")


@dataclass(kw_only=True)
class QuantizeRequest(ABC):
    """What the user asked for. model_name is used unless a model is connected; steps are the
    sampler's; memory_gb is for measurements.
    """

    method: ClassVar[type[QuantizeJob]]

    model_name: str
    recipe: Any
    filename: str = ""
    overwrite: bool = False
    model: ModelPatcher | None = None
    positive: list | None = None
    latent: dict | None = None
    clip: Any = None  # a text encoder, for prompts of Nibble's own
    steps: int = 8
    memory_gb: float = 4.0
    node_id: str | None = None

    def run(self) -> tuple[str, Report]:
        """Quantizes; returns the new file's name for the load node, and the report. Raises
        FileRefused and ValueError in plain words.
        """
        self.check()
        self.positive = prompts.with_own(self.positive, self.clip)
        source = self.open_source()
        wanted = new_name(self.origin, self.filename, self.ending)
        with folders.new_file(wanted, FOLDER, self.overwrite, beside=source.path) as new:
            job = self.method.prepare(source, new.held, self.recipe)
            refuse_encoder(source)
            try:
                report = self.existing_report(job)
                if report is None:
                    report = self._measure_and_write(job, new.name)
            finally:
                comfy.model_management.soft_empty_cache()
        # so that the load node of this very graph finds the file
        folders.refresh(FOLDER)
        return new.name, report

    @property
    @abstractmethod
    def ending(self) -> str:
        """What is added to the origin's name where the user gave none."""

    def check(self) -> None:  # noqa: B027  (most requests can be tried)
        """Raises ValueError for a request that cannot be met, before anything is read."""

    def existing_report(self, job: QuantizeJob) -> Report | None:
        """All is done already, whatever it was measured on: without prompts, the model need not
        even be loaded to see it.
        """
        if self.positive or job.existing is None:
            return None
        if job.existing.fact("calibration").get("kind") == "prompts":
            return None
        return job.existing_report()

    def random_pictures(self, patcher: ModelPatcher) -> record_inputs.Pictures | NotMeasured:
        """What to draw where the user gave no prompts."""
        return record_inputs.random_pictures(patcher, self.recipe.seed)

    def provenance(self, recording: Recording | NotMeasured) -> dict:
        """Where the measurement comes from, for the file's metadata."""
        if isinstance(recording, NotMeasured):
            return {"kind": "weights only"}
        return recording.pictures.provenance()

    def write(
        self, job: QuantizeJob, recording: Recording | NotMeasured, provenance: dict
    ) -> Report:
        """Measures what can be measured, and quantizes. Raises DrawingFailed where the recipe needs
        what cannot be measured; else the weights alone are used, which the report says.
        """
        statistics = {}
        if isinstance(recording, Recording) and self.reads_inputs:
            try:
                statistics = self._record(recording, job.quantized_names)
            except DrawingFailed as failure:
                if self.needs_inputs:
                    raise
                recording = NotMeasured(failure.reason)
                provenance = self.provenance(recording)
        self.note(job, recording)
        # quantizing needs VRAM, and a model that was only measured is not needed again
        comfy.model_management.unload_all_models()
        return job.write(
            Measurement(provenance, statistics.get),
            watched(self.node_id),
            comfy.model_management.get_torch_device(),
        )

    def note(self, job: QuantizeJob, recording: Recording | NotMeasured) -> None:
        """Adds to the report what was measured, where it was not the user's own prompts."""
        if isinstance(recording, NotMeasured):
            log.warning("%s: %s", job.source.name, recording.note)
            job.source.notes.append(recording.note)
        elif not self.positive:
            job.source.notes.append(self.noise_note)
        elif self.reads_inputs and len(self.positive) < ENOUGH_PROMPTS:
            note = few_prompts(len(self.positive))
            log.warning("%s: %s", job.source.name, note)
            job.source.notes.append(note)

    @property
    def noise_note(self) -> str:
        """What the report says of a measurement without prompts."""
        return ON_NOISE

    @property
    def reads_inputs(self) -> bool:
        """Whether the recipe has a use for recorded inputs."""
        return True

    @property
    def needs_inputs(self) -> bool:
        """Whether the recipe can do nothing without them."""
        return False

    @property
    def memory_cap(self) -> int:
        """Bytes of measurements to hold at once."""
        return int(self.memory_gb * 1e9)

    @property
    def origin(self) -> str:
        """What the new file is named after."""
        if self.model is None:
            return sources.origin(self.model_name)
        return f"{type(self.model.model).__name__.lower()}-patched"

    def open_source(self) -> Source | StateDictSource:
        """The weights to quantize: the connected model's, else the file's."""
        if self.model is not None:
            return StateDictSource(PatchedWeights(self.model), metadata=metadata_of(self.model))
        return Source(sources.path_of(self.model_name))

    def _measure_and_write(self, job: QuantizeJob, name: str) -> Report:
        recording = self._recording(job.source)
        provenance = self.provenance(recording)
        report = job.existing_report(provenance)
        if report is not None:
            return report
        if job.target.exists() and not self.overwrite:
            raise FileRefused(
                f"{name} exists already and was made with other options; switch 'overwrite' on, or"
                " give another filename."
            )
        return self.write(job, recording, provenance)

    def _record(self, recording: Recording, names: list[str]) -> dict[str, InputStats]:
        progress = Progress("measuring", self.node_id, unit="step")
        return record_inputs.record(recording, names, self.memory_cap, progress)

    def _recording(self, source: Source | StateDictSource) -> Recording | NotMeasured:
        """The 16-bit model and what to draw with it, or why the weights alone are used."""
        asked = self.model is not None or self.positive
        if not asked and not record_inputs.fits_in_memory(source.loaded_bytes):
            return NotMeasured(
                "the 16-bit model does not fit in memory",
                advice="connect 'positive' to measure anyway",
            )
        patcher = self.model
        if patcher is None:
            assert isinstance(source, Source)  # as `open_source` has it
            patcher = sources.load(source)
            built = find_linears(patcher.model.diffusion_model)
            refusal = architectures.missing_layer(source.shapes, built, source.name)
            if refusal is not None:
                raise refusal
        if self.positive:
            pictures = record_inputs.pictures_of(
                patcher, self.positive, self.latent, self.steps, self.recipe.seed
            )
            return Recording(patcher, pictures)
        pictures = self.random_pictures(patcher)
        if isinstance(pictures, NotMeasured):
            return pictures
        return Recording(patcher, pictures)


def watched(node_id: str | None) -> Monitor:
    """The monitor of a quantization: bar, layers and time left in the node, and Stop."""
    progress = Progress("quantizing", node_id, unit="layer", resumes=True)
    return Monitor(progress, progress.heed, layers=progress.count)


def refuse_encoder(source: Source | StateDictSource) -> None:
    """Raises FileRefused for a text encoder, which has a node of its own."""
    family = text_encoders.family_of(source.shapes)
    if family is not None:
        raise FileRefused(
            f"{source.name} is a text encoder ({family.name}): put it into models/text_encoders and"
            " choose it in Quantize Text Encoder."
        )


def new_name(origin: str, filename: str, ending: str, folder: str = FOLDER) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else beside its origin, with a method's
    ending. Raises FileRefused for what no file can be called.
    """
    default = file_names.beside(origin, f"-{ending}")
    return folders.plain_name(filename, default, folder, ".safetensors", subfolders=True)
