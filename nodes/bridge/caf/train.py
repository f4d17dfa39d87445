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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....accel.caf import adapter as caf_adapter
from ....accel.caf import flow, heads, objectives
from ....accel.caf.adapter import Adapter
from ....accel.caf.couplings import Couplings
from ....quant.calibration.recorder import find_linears
from ....quant.files.errors import FileRefused
from ....quant.training import loop
from ....quant.training.loop import OPTIMIZERS, Options
from ..host import charts, folders
from ..host.fingerprint import fingerprint, patches_fingerprint
from ..host.progress import Progress
from ..training import session as training
from ..training.curve import curve_chart
from ..training.watch import Watch, kept, resumable
from . import load as caf_model
from . import training_free as caf

PHASES = ("velocity", "acceleration")
# of the `Options`, as in tests/bench/results/caf-distilled.json
RECIPE = {"decay": 1.0, "weight_decay": 0.0, "warmup": 30}
HELD_OUT = 16  # one pair in so many is not trained on, where there are HELD_FROM or more
HELD_FROM = 8
MOST_MEASURED = 4  # held-out pairs that are drawn at every preview
STEPS = 2  # of CAF's sampler in previews and measurements
_MEMORY = {"checkpointing": None, "offloading": None}  # settings that change memory, not numbers
__all__ = ["OPTIMIZERS", "RECIPE", "Job", "Options", "Trained", "run"]


@dataclass(frozen=True)
class Job:
    """What the user asked for. options.steps: of each net; rank 0: whole differences; layers:
    patterns of layer names, none for all linears of the model's blocks; preview_every: steps, 0 for
    none.
    """

    model: ModelPatcher
    couplings: Couplings
    filename: str
    options: Options = field(default_factory=lambda: Options(**RECIPE))
    settings: training.Settings = field(default_factory=training.Settings)
    rank: int = 16
    h: float = 1.0
    overwrite: bool = False
    layers: tuple[str, ...] = ()
    preview_every: int = 50
    node_id: str | None = None


@dataclass(frozen=True)
class Trained:
    """name: in ComfyUI's lists; losses: of both nets, one after the other; steps: of both."""

    name: str
    losses: list[float]
    steps: int
    chart: dict


def run(job: Job) -> Trained:
    """Trains and saves. Raises FileRefused and ValueError in plain words before anything is loaded,
    and ComfyUI's interrupt.
    """
    _check(job)
    data = _data(job, names := _layers(job))
    if (done := _finished(job, data)) is not None:
        return done
    target, name = folders.new_file(file_name(job.filename), caf_model.FOLDER, job.overwrite)
    states = {
        phase: target.with_name(f"{target.name.removesuffix(caf_model.ENDING)}.caf.{phase}.state")
        for phase in PHASES
    }
    if job.overwrite and not all(
        resumable(state, data) for state in states.values() if state.exists()
    ):
        _forget(states)
    with torch.inference_mode(False):
        adapter = Adapter.create(
            job.model.model.diffusion_model, names, job.rank, job.h, job.options.seed % 2**32
        )
    run, captions = _Run(job, name, data, states, adapter), job.couplings.captions
    try:
        # captions on disk bring no models
        training.run(
            job.model, captions, (1, *job.couplings.shape), job.settings, run.work, captions[:1]
        )
    except FileRefused:
        raise
    except ValueError as error:  # a loss or a gradient that is no number
        phase = PHASES[bool(run.losses["acceleration"])]
        raise ValueError(kept(str(error), run.losses[phase], states[phase])) from error
    adapter.facts |= run.facts()
    caf_adapter.save_file(adapter, target)
    _forget(states)
    folders.refresh(caf_model.FOLDER)
    return Trained(
        name, run.all, len(run.all), _chart(job, name, run.losses, _summary(adapter, target))
    )


class _Run:
    """A training while it goes on: losses of each phase so far, and what was measured last."""

    def __init__(self, job: Job, name: str, data: str, states: dict[str, Path], adapter: Adapter):
        self.job, self.data, self.states, self.adapter = job, data, states, adapter
        self.losses: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.train, self.held = split(len(job.couplings))
        self.error: float | None = None
        self.euler: float | None = None
        self.watch = Watch(
            job.node_id,
            lambda summary: _chart(job, name, self.losses, [*self.measured(), *summary]),
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
        return _measured({"pairs": len(self.held), "error": self.error, "euler": self.euler})

    def work(self, session: training.Session) -> None:
        """Both phases, while the model is loaded."""
        with contextlib.closing(Student(session, self.adapter)) as student:
            if self.held:
                self.euler = self.compare(
                    session, lambda noise, caption: session.euler(noise, caption, STEPS + 1)
                )
            batches, ends = self.batches(session), objectives.ENDS
            self.adapter.to(session.device)
            self.phase(
                student,
                "velocity",
                objectives.velocity_objective(
                    student.velocity, batches, self.job.h, ends["velocity"]
                ),
            )
            loss = objectives.acceleration_objective(
                student.acceleration, student.velocity, batches, ends["acceleration"]
            )
            self.phase(student, "acceleration", loss)
            self.measure(student)
            dtype = training.DTYPES[session.settings.dtype] or session.inner.get_dtype_inference()
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

    def batches(self, session: training.Session) -> objectives.Batches:
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

    def compare(self, session: training.Session, draw: Callable[[Tensor, int], Tensor]) -> float:
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


class Student:
    """The session's model as both nets, by the heads of an adapter.

    The head of the last call stays on until the next one, or until it is closed: blocks that are
    computed again in the backward pass need it.
    """

    def __init__(self, session: training.Session, adapter: Adapter):
        self.session, self.adapter, self._on = session, adapter, contextlib.ExitStack()

    def close(self) -> None:
        """Takes the heads off the model."""
        self._on.close()

    def velocity(self, x: Tensor, t: Tensor, captions: Sequence[int]) -> Tensor:
        """x (batch, …), t (batch,), a caption each → the initial velocity."""
        return heads.velocity_net(self._model("velocity", captions), self.adapter.h)(x, t)

    def acceleration(self, x: Tensor, t: Tensor, start: Tensor, captions: Sequence[int]) -> Tensor:
        """As `velocity`, and start (batch, …) → the acceleration."""
        return heads.acceleration_net(self._model("acceleration", captions), self.adapter.h)(
            x, t, start
        )

    def sample(self, noise: Tensor, captions: Sequence[int]) -> Tensor:
        """noise (batch, …) → data, in STEPS."""
        return flow.sample(
            lambda x, t: self.velocity(x, t, captions),
            lambda x, t, start: self.acceleration(x, t, start, captions),
            noise,
            flow.uniform(STEPS),
            ahead=flow.AHEAD,
            h=self.adapter.h,
        )

    def _model(self, head: str, captions: Sequence[int]) -> heads.Model:
        def ask(x: Tensor, sigma: Tensor, start: Tensor | None) -> Tensor:
            sigma = sigma.clamp_min(caf_model.LEAST_SIGMA)
            groups = self.session.groups(captions, torch.zeros_like(x[:1]))
            parts = [
                self._call(
                    head,
                    x[rows],
                    sigma[rows],
                    None if start is None else start[rows],
                    [captions[row] for row in rows],
                )
                for rows in groups
            ]
            order = torch.tensor(
                [row for rows in groups for row in rows], device=x.device
            ).argsort()
            return torch.cat(parts)[order]

        return ask

    def _call(
        self, head: str, x: Tensor, sigma: Tensor, start: Tensor | None, captions: list[int]
    ) -> Tensor:
        """dx/dt towards the data, as the model with a head sees it."""
        worn, place, presented = self.adapter.head(head), self.adapter.input_layer, None
        if start is not None and worn.extra is not None:
            presented = caf_adapter.presented_by(
                self.session.model, place, lambda: self.session.denoised(start, sigma, captions)
            )
        self._on.close()
        self._on.enter_context(
            caf_adapter.attached(
                self.session.model, worn, place, presented, self.adapter.strength(sigma)
            )
        )
        return (self.session.denoised(x, sigma, captions) - x) / flow.at(sigma, x)


def split(pairs: int) -> tuple[range, range]:
    """Pairs to train on, and those held out: the last ones."""
    held = max(1, pairs // HELD_OUT) if pairs >= HELD_FROM else 0
    return range(pairs - held), range(pairs - held, pairs)


# ---- before anything is loaded


def file_name(filename: str) -> str:
    """The file's name in ComfyUI's lists, with its ending."""
    return (filename.strip() or "trained").removesuffix(".safetensors").removesuffix(
        ".caf"
    ) + caf_model.ENDING


def _check(job: Job) -> None:
    """Raises ValueError for a model or couplings that cannot be trained with."""
    caf.check_model(job.model.get_model_object("model_sampling"), "Train CAF")
    if (worn := job.model.get_attachment(caf_model.KEY)) is not None:
        raise ValueError(
            f"The connected model already has the heads of {worn.name}; connect the model from"
            " before Load CAF Model."
        )
    if not 0 <= job.h <= 2:
        raise ValueError(
            f"h = {job.h} is outside 0 to 2, where the path runs forward only; 1 is a constant"
            " speed."
        )
    form, shape = job.model.get_model_object("latent_format"), job.couplings.shape
    own = form.process_in(
        torch.zeros(1, form.latent_channels, *[8] * form.latent_dimensions)
    ).shape[1:]
    if (len(shape), shape[0]) != (len(own), own[0]):
        raise ValueError(
            f"The couplings are of {' x '.join(map(str, shape))}, and this model's latents have"
            f" {own[0]} channels in {len(own) - 1} dimensions; connect the model that they were"
            " made with, or a quantized version of it."
        )


def _layers(job: Job) -> list[str]:
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
    blocks = tuple(f"{name}." for name in training.blocks_of(network))
    names = [name for name in linears if name.startswith(blocks)]
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no lists of blocks; list in layers which of its linear"
            " layers to train, for example *attn*."
        )
    return names


def _data(job: Job, names: list[str]) -> str:
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
            caf_adapter.MIDDLE,
            objectives.ENDS,
            names,
        ]
    )


def _digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]


def _finished(job: Job, data: str) -> Trained | None:
    """The result of a run with the same inputs that has been saved already."""
    name = file_name(job.filename)
    if job.overwrite or folders.find(name, caf_model.FOLDER) is None:
        return None
    path = caf_model.path_of(name)
    adapter = caf_adapter.read_file(path)
    if [adapter.facts.get(key) for key in ("run", "lr")] != [data, job.options.lr]:
        return None
    losses = adapter.facts["losses"]
    chart = _chart(
        job, name, losses, _summary(adapter, path), "trained already, with the same inputs"
    )
    return Trained(
        name,
        [loss for phase in PHASES for loss in losses[phase]],
        sum(map(len, losses.values())),
        chart,
    )


def _forget(states: dict[str, Path]) -> None:
    for state in states.values():
        state.unlink(missing_ok=True)


# ---- what it shows


def _chart(
    job: Job,
    name: str,
    losses: dict[str, list[float]],
    summary: list[tuple[str, str]],
    facts: str = "",
) -> dict:
    """The curve so far."""
    if not facts:
        size = f"rank {job.rank}" if job.rank else "whole layers"
        facts = f"{size}, h = {job.h:g}, {job.options.optimizer}, {job.options.lr:g}"
    steps = job.options.steps
    return curve_chart(
        [loss for phase in PHASES for loss in losses[phase]],
        2 * steps,
        name,
        facts,
        summary,
        list(zip(PHASES, (0, steps), strict=True)),
    )


def _measured(held: dict) -> list[tuple[str, str]]:
    if held["error"] is None:
        return []
    return [
        (
            "held-out error",
            f"{held['error']:.3g} at {STEPS + 1} calls; the model itself {held['euler']:.3g}",
        )
    ]


def _summary(adapter: Adapter, target: Path) -> list[tuple[str, str]]:
    facts = adapter.facts
    held = facts["held_out"]["pairs"]
    return [
        *_measured(facts["held_out"]),
        ("pairs", f"{facts['pairs'] - held}" + (f" and {held} held out" if held else "")),
        ("layers", str(len(adapter.velocity.names))),
        ("file", charts.size(target.stat().st_size)),
    ]
