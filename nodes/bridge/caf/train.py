"""Train CAF: two heads beside a flow model's frozen weights, learned from couplings; saved, and
resumed where it was stopped.

The velocity net is trained first, then the acceleration net, which begins where the velocity net is
(`accel/caf/heads.py` has both, `objectives.py` their losses). While it runs,
`NAME.caf.velocity.state` and `NAME.caf.acceleration.state` lie beside the file to be: a head, the
optimizer's memory and every loss so far. They are written at Stop, on errors and now and then, and
removed when the file is saved; the next run with the same inputs goes on.

One pair in HELD_OUT is not trained on: CAF's picture of its noise is compared with the teacher's,
and with that of the model itself at as many calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ....accel.caf import objectives
from ....accel.caf.adapter import MIDDLE, CAFAdapter
from ....accel.caf.heads_file import ENDING, read_file, save_file
from ....quant.calibration.recorder import find_linears
from ....quant.files.errors import FileRefused
from ....quant.training import loop
from ....quant.training import state as states
from ....quant.training.loop import OPTIMIZERS, Options
from ..host import folders
from ..host.fingerprint import fingerprint, patches_fingerprint
from ..host.folders import NewFile
from ..host.progress import Progress
from ..training.session import DTYPES, Session, blocks_of
from ..training.session import run as run_session
from ..training.watch import Watch, what_is_kept
from .load import FOLDER, KEY, path_of
from .straight import coordinates_of, noise_of
from .student import STEPS, Student
from .training_job import PHASES, RECIPE, TrainingJob, measured_lines, summary_lines, training_chart

HELD_OUT = 16  # one pair in so many is not trained on, where there are HELD_FROM or more
HELD_FROM = 8
MOST_MEASURED = 4  # held-out pairs that are drawn at every preview
_MEMORY = {"checkpointing": None, "offloading": None}  # settings that change memory, not numbers
__all__ = ["OPTIMIZERS", "RECIPE", "Options", "Trained", "TrainingJob", "train"]


@dataclass(frozen=True)
class Trained:
    """name: in ComfyUI's lists; losses: of both nets, one after the other; steps: of both."""

    name: str
    losses: list[float]
    steps: int
    chart: dict


def train(job: TrainingJob) -> Trained:
    """Trains and saves. Raises FileRefused and ValueError in plain words before anything is loaded,
    and ComfyUI's interrupt.
    """
    _check(job)
    names = _layers(job)
    data = _data(job, names)
    with folders.new_file(file_name(job.filename), FOLDER, job.overwrite) as new:
        files = {
            phase: new.path.with_name(f"{new.path.name.removesuffix(ENDING)}.caf.{phase}.state")
            for phase in PHASES
        }
        before = _trained_before(job, data)
        if before is None:
            return _trained(job, data, names, new, files)
        for state in files.values():
            if states.is_of(state, data):  # killed between saving and removing it
                states.forget(state)
        return before


def _trained(
    job: TrainingJob, data: str, names: list[str], new: NewFile, files: dict[str, Path]
) -> Trained:
    """Trains and saves, while the file is held."""
    new.check()
    if job.overwrite and not all(
        states.is_of(state, data) for state in files.values() if state.exists()
    ):
        _forget(files)
    with torch.inference_mode(False):
        adapter = CAFAdapter.create(
            job.model.model.diffusion_model, names, job.rank, job.h, job.options.seed % 2**32
        )
    phases = _Phases(job, new.name, data, files, adapter)
    captions = job.couplings.captions
    try:
        # captions on disk bring no models
        run_session(
            job.model, captions, (1, *job.couplings.shape), job.settings, phases.work, captions[:1]
        )
    except FileRefused:
        raise
    except ValueError as error:  # a loss or a gradient that is no number
        phase = "acceleration" if phases.losses["acceleration"] else "velocity"
        raise ValueError(what_is_kept(str(error), phases.losses[phase], files[phase])) from error
    adapter.facts |= phases.facts()
    new.check()
    save_file(adapter, new.held)
    _forget(files)
    folders.refresh(FOLDER)
    return Trained(
        name=new.name,
        losses=phases.all,
        steps=len(phases.all),
        chart=training_chart(job, new.name, phases.losses, summary_lines(adapter, new.path)),
    )


class _Phases:
    """A training while it goes on: losses of each phase so far, and what was measured last."""

    def __init__(
        self, job: TrainingJob, name: str, data: str, states: dict[str, Path], adapter: CAFAdapter
    ):
        self.job = job
        self.data = data
        self.states = states
        self.adapter = adapter
        self.losses: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.train, self.held = split(len(job.couplings))
        self.error: float | None = None
        self.euler: float | None = None
        self.watch = Watch(
            job.node_id,
            lambda summary: training_chart(job, name, self.losses, [*self.measured(), *summary]),
            job.preview_every,
        )

    @property
    def all(self) -> list[float]:
        """Losses of all steps so far."""
        return [loss for phase in PHASES for loss in self.losses[phase]]

    def facts(self) -> dict:
        """For the file."""
        losses = {
            phase: [float(f"{loss:.6g}") for loss in losses]
            for phase, losses in self.losses.items()
        }
        return {
            "run": self.data,
            "lr": self.job.options.lr,
            "steps": self.job.options.steps,
            "losses": losses,
            "pairs": len(self.job.couplings),
            "held_out": {"pairs": len(self.held), "error": self.error, "euler": self.euler},
        }

    def measured(self) -> list[tuple[str, str]]:
        """Summary lines."""
        return measured_lines({"pairs": len(self.held), "error": self.error, "euler": self.euler})

    def work(self, session: Session) -> None:
        """Both phases, while the model is loaded."""
        with contextlib.closing(Student(session, self.adapter)) as student:
            if self.held:
                self.euler = self.compare(
                    session,
                    lambda start, caption: session.euler(
                        noise_of(session.inner.model_sampling, start), caption, STEPS + 1
                    ),
                )
            batches, ends = self.batches(session), objectives.ENDS
            distance = self.job.settings.loss
            self.adapter.to(session.device)
            self.phase(
                student,
                "velocity",
                objectives.velocity_objective(
                    student.velocity, batches, self.job.h, ends["velocity"], distance
                ),
            )
            loss = objectives.acceleration_objective(
                student.acceleration, student.velocity, batches, ends["acceleration"], distance
            )
            self.phase(student, "acceleration", loss)
            self.measure(student)
            dtype = DTYPES[session.settings.dtype] or session.inner.get_dtype_inference()
        self.adapter.to("cpu", dtype)  # what the model computed with

    def phase(
        self, student: Student, phase: str, loss: Callable[[torch.Generator], Tensor]
    ) -> None:
        """Trains one head."""
        job, losses, session = self.job, self.losses[phase], student.session
        # the velocity net, which is there by then
        beside = (
            _digest(self.adapter.velocity.tensors().values()) if phase == "acceleration" else ""
        )
        running = loop.steps(
            self.adapter.head(phase).tensors(),
            loss,
            job.options,
            json.dumps([beside, self.data]),
            self.states[phase],
            session.checkpointed(),
            losses,
        )
        steps, before = job.options.steps, PHASES.index(phase) * job.options.steps
        with contextlib.closing(running):
            for step, value in running:
                self.watch(
                    before + step,
                    2 * steps,
                    f"{phase} net, step {step} of {steps}, loss {value:.4f}",
                    lambda: self.preview(student),
                )

    def batches(self, session: Session) -> objectives.Batches:
        """generator → (noise, data, captions) of pairs that are not held out, drawn on the CPU."""

        def draw(generator: torch.Generator) -> objectives.Batch:
            chosen = torch.randperm(len(self.train), generator=generator)[
                : self.job.settings.batch
            ].tolist()
            noise, data, captions = self.job.couplings.batch([self.train[i] for i in chosen])
            return noise.to(session.device), data.to(session.device), captions

        return draw

    def preview(self, student: Student) -> tuple | None:
        """Measures, and draws the first pair that is measured, or the first of all."""
        self.measure(student)
        noise, _, caption = self.job.couplings.pair(self.held[0] if self.held else 0)
        return student.session.preview(
            lambda: student.sample(noise.to(student.session.device), [caption])
        )

    def measure(self, student: Student) -> None:
        if self.held:
            self.error = self.compare(
                student.session, lambda noise, caption: student.sample(noise, [caption])
            )

    def compare(self, session: Session, draw: Callable[[Tensor, int], Tensor]) -> float:
        """Mean squared distance of what is drawn of held-out noise from the teacher's data, over
        the variance of that.
        """
        wrong, pictures = 0.0, []
        for i in self.held[:MOST_MEASURED]:
            Progress.check()
            noise, data, caption = self.job.couplings.pair(i)
            with torch.no_grad():
                drawn = draw(noise.to(session.device), caption)
            wrong += (drawn.cpu() - data).double().square().mean().item()
            pictures.append(data.double())
        return wrong / len(pictures) / max(torch.cat(pictures).var().item(), 1e-12)


def split(pairs: int) -> tuple[range, range]:
    """Pairs to train on, and those held out: the last ones."""
    held = max(1, pairs // HELD_OUT) if pairs >= HELD_FROM else 0
    return range(pairs - held), range(pairs - held, pairs)


# ---- before anything is loaded


def file_name(filename: str) -> str:
    """The file's name in ComfyUI's lists, with its ending."""
    return folders.plain_name(filename, "trained", FOLDER, ENDING, subfolders=True)


def _check(job: TrainingJob) -> None:
    """Raises ValueError for a model or couplings that cannot be trained with."""
    coordinates_of(job.model.get_model_object("model_sampling"), "Train CAF")
    heads = job.model.get_attachment(KEY)
    if heads is not None:
        raise ValueError(
            f"The connected model already has the heads of {heads.name}; connect the model from"
            " before Load CAF Model."
        )
    if not 0 <= job.h <= 2:
        raise ValueError(
            f"h = {job.h} is outside 0 to 2, where the path runs forward only; 1 is a constant"
            " speed."
        )
    shape = job.couplings.shape
    latent_format = job.model.get_model_object("latent_format")
    sides = [8] * latent_format.latent_dimensions
    empty = torch.zeros(1, latent_format.latent_channels, *sides)
    own = latent_format.process_in(empty).shape[1:]
    if (len(shape), shape[0]) != (len(own), own[0]):
        raise ValueError(
            f"The couplings are of {' x '.join(map(str, shape))}, and this model's latents have"
            f" {own[0]} channels in {len(own) - 1} dimensions; connect the model that they were"
            " made with, or a quantized version of it."
        )


def _layers(job: TrainingJob) -> list[str]:
    """Names of the linears that get branches."""
    network = job.model.model.diffusion_model
    linears = find_linears(network)
    if job.layers:
        names = [
            name for name in linears if any(fnmatchcase(name, pattern) for pattern in job.layers)
        ]
        if not names:
            raise ValueError(
                f"No linear layer of the model is called {' or '.join(job.layers)}; it has"
                f" {', '.join(list(linears)[:3])} and so on."
            )
        return names
    blocks = tuple(f"{name}." for name in blocks_of(network))
    names = [name for name in linears if name.startswith(blocks)]
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no lists of blocks; list in layers which of its linear"
            " layers to train, for example *attn*."
        )
    return names


def _data(job: TrainingJob, names: list[str]) -> str:
    """All that the result depends on besides the learning rate, which may change; the number of
    steps says when that falls.
    """
    options = {
        name: value
        for name, value in dataclasses.asdict(job.options).items()
        if name not in ("lr", "save_every")
    }
    settings = dataclasses.asdict(job.settings) | _MEMORY
    model = [fingerprint(job.model), patches_fingerprint(job.model)]
    return json.dumps(
        [
            job.couplings.digest(),
            model,
            options,
            settings,
            job.rank,
            job.h,
            MIDDLE,
            objectives.ENDS,
            names,
        ]
    )


def _digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]


def _trained_before(job: TrainingJob, data: str) -> Trained | None:
    """The result of a run with the same inputs that has been saved already."""
    name = file_name(job.filename)
    if job.overwrite or folders.find(name, FOLDER) is None:
        return None
    path = path_of(name)
    adapter = read_file(path)
    if [adapter.facts.get(key) for key in ("run", "lr")] != [data, job.options.lr]:
        return None
    losses = adapter.facts["losses"]
    chart = training_chart(
        job, name, losses, summary_lines(adapter, path), "trained already, with the same inputs"
    )
    return Trained(
        name=name,
        losses=[loss for phase in PHASES for loss in losses[phase]],
        steps=sum(map(len, losses.values())),
        chart=chart,
    )


def _forget(files: dict[str, Path]) -> None:
    for state in files.values():
        states.forget(state)
