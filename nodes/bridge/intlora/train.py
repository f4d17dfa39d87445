"""Train IntLoRA: an adapter of a 4-bit model's integers, learned beside its kernels, or of a 16-bit
model's rounded weights, in their place; saved, and resumed where it was stopped.

While it runs, `NAME.intlora.state` lies beside the file to be: factors, the optimizer's memory and
every loss so far. It is written at Stop, on errors and now and then, and removed when the adapter
is saved; the next run with the same inputs goes on from it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ....quant.files.errors import FileRefused
from ....quant.intlora import file, train
from ....quant.intlora.adapter import Adapter
from ....quant.intlora.linear import IntLoRALinear
from ....quant.merge.integer_grid import IntBase
from ....quant.training import state as states
from ....quant.training.loop import OPTIMIZERS, Options
from ..host import folders
from ..host.charts import size
from ..host.folders import NewFile
from ..training import session as training
from ..training.curve import curve_chart
from ..training.dataset import Dataset, dataset_of
from ..training.watch import Watch, what_is_kept
from . import files, rounded
from .bases import Bases

NONE = "[None]"  # existing_lora: start anew
INTEGERS = "the model's 4-bit integers"
BASES = (INTEGERS, *rounded.BASES)
STATE = ".intlora.state"
__all__ = ["BASES", "INTEGERS", "NONE", "OPTIMIZERS", "Job", "Trained", "run"]


@dataclass(frozen=True)
class Job:
    """What the user asked for. layers: patterns of layer names, none for all W4A4 layers;
    preview_every: steps, 0 for none; base: one of BASES.
    """

    model: ModelPatcher
    latents: list[dict]
    positive: list[list]
    filename: str
    options: Options = field(default_factory=Options)
    settings: training.Settings = field(default_factory=training.Settings)
    variant: str = "shift_add"
    rank: int = 8
    overwrite: bool = False
    existing: str = NONE
    layers: tuple[str, ...] = ()
    preview_every: int = 50
    node_id: str | None = None
    base: str = INTEGERS


@dataclass(frozen=True)
class Trained:
    """name: in ComfyUI's lists; lora: the factors as an ordinary LoRA (LORA_MODEL); steps: those of
    the adapter that it began with included.
    """

    name: str
    lora: dict[str, torch.Tensor]
    losses: list[float]
    steps: int
    chart: dict


def run(job: Job) -> Trained:
    """Trains and saves. Raises FileRefused and ValueError in plain words before anything is loaded,
    and ComfyUI's interrupt.
    """
    if job.base not in BASES:
        raise ValueError(f"base {job.base!r} is not one of {', '.join(BASES)}")
    bases = Bases(job.model) if job.base == INTEGERS else rounded.Weights(job.model)
    pictures = dataset_of(job.model, job.latents, job.positive)
    names = _layers(bases, job)
    existing = _existing(job, bases, names)
    data = _data(job, pictures, names, bases)
    with files.new_file(files.file_name("", job.filename or "trained"), job.overwrite) as new:
        state = new.path.with_name(new.path.name.removesuffix(files.ENDING) + STATE)
        plan = _Plan(pictures, names, existing, state, data)
        done = _existing_result(job, data)
        if done is None:
            return _trained(job, plan, new)
        if states.is_of(state, data):  # killed between saving and removing it
            states.forget(state)
        return done


def _trained(job: Job, plan: _Plan, new: NewFile) -> Trained:
    """Trains and saves, while the file is held."""
    new.check()
    if job.overwrite and not states.is_of(plan.state, plan.data):
        states.forget(plan.state)
    losses: list[float] = []
    watch = Watch(
        job.node_id, lambda summary: _chart(job, new.name, losses, summary), job.preview_every
    )
    try:
        adapter = training.run(
            job.model,
            plan.pictures.captions,
            plan.pictures.latents[0].shape,
            job.settings,
            lambda session: _work(session, job, plan, watch, losses),
        )
    except FileRefused:
        raise
    except ValueError as error:  # a loss or a gradient that is no number
        raise ValueError(what_is_kept(str(error), losses, plan.state)) from error
    existing = plan.existing
    steps = len(losses) + int(existing.facts.get("steps", 0) if existing else 0)
    facts = {
        "steps": steps,
        "run": plan.data,
        "losses": [float(f"{loss:.6g}") for loss in losses],
        "pictures": len(plan.pictures.latents),
    }
    adapter = Adapter(adapter.layers, facts)
    new.check()
    file.save(adapter, new.held)
    states.forget(plan.state)
    files.refresh()
    return Trained(
        name=new.name,
        lora=_as_lora(adapter),
        losses=losses,
        steps=steps,
        chart=_chart(job, new.name, losses, _summary(adapter, new.path)),
    )


@dataclass(frozen=True)
class _Plan:
    """What is known before the model is loaded. names: of the layers; existing: the adapter to go
    on with; state: where an interrupted run goes on from; data: all that the result depends on.
    """

    pictures: Dataset
    names: list[str]
    existing: Adapter | None
    state: Path
    data: str


def _work(
    session: training.Session, job: Job, plan: _Plan, watch: Watch, losses: list[float]
) -> Adapter:
    """The training itself, while the model is loaded."""
    layers = _attached(session, job, plan)

    def watched(step: int, steps: int, loss: float) -> None:
        watch(
            step,
            steps,
            f"step {step} of {steps}, loss {loss:.4f}",
            lambda: session.preview(lambda: plan.pictures.draw(session)),
        )

    try:
        if plan.existing is not None:
            _fill(layers, plan.existing)
        train.train(
            layers,
            lambda generator: plan.pictures.loss(session, generator),
            job.options,
            plan.state,
            session.checkpointed(),
            watched,
            plan.data,
            losses,
        )
        adapter = train.adapter(layers)
        return Adapter({name: layer.to("cpu") for name, layer in adapter.layers.items()})
    finally:
        train.detach(session.model, layers)


def _attached(session: training.Session, job: Job, plan: _Plan) -> dict[str, IntLoRALinear]:
    """The layers to train, in the places of the model's own."""
    seed = job.options.seed % 2**32
    if job.base != INTEGERS:
        options = rounded.options_of(job.base, job.variant, job.rank, seed)
        return rounded.attach(session, plan.names, options, plan.existing, job.existing)
    found = Bases(session.guider.model_patcher)
    bases = {name: _near(found[name], session.device, job.variant) for name in plan.names}
    options = train.AdapterOptions(variant=job.variant, rank=job.rank, seed=seed)
    return train.attach(session.model, plan.names, options, bases)


def _near(base: IntBase, device: torch.device, variant: str) -> IntBase:
    """The base where training needs it: SHIFT-ADD never reads the codes, so those of a streamed
    layer may stay in RAM.
    """
    near = base.to(device)
    return near if variant != "shift_add" else dataclasses.replace(near, codes=base.codes)


# ---- before anything is loaded


def _layers(bases: Bases | rounded.Weights, job: Job) -> list[str]:
    """Names of the layers to train."""
    if job.layers:
        names = [
            name for name in bases if any(fnmatchcase(name, pattern) for pattern in job.layers)
        ]
        if not names:
            raise ValueError(
                f"No {bases.KIND} of the model is called {' or '.join(job.layers)}; it has"
                f" {', '.join(list(bases)[:3])} and so on."
            )
    else:
        names = bases.trainable()
    if isinstance(bases, Bases):
        bases.refuse_uneven(names)
    small = min(names, key=lambda name: min(bases.weights[name].shape))
    if not 1 <= job.rank <= min(bases.weights[small].shape):
        raise ValueError(
            f"rank {job.rank} is not between 1 and {min(bases.weights[small].shape)}, the smaller"
            f" side of {small}; choose another rank."
        )
    if job.base != INTEGERS:
        rounded.refuse_patched(job.model, names)
    return names


def _existing(job: Job, bases: Bases | rounded.Weights, names: list[str]) -> Adapter | None:
    """The adapter to go on with. Raises FileRefused where it does not fit the model or what is
    asked for.
    """
    if job.existing == NONE:
        return None
    adapter = file.read(files.path_of(job.existing))
    bases.check(adapter, job.existing)
    base = rounded.base_of(adapter)
    if base != (None if job.base == INTEGERS else job.base):
        raise FileRefused(
            f"{job.existing} was trained on the base '{base}'; set base as it was, or start over"
            f" with existing_lora {NONE}."
        )
    for name in names:
        layer = adapter.layers.get(name)
        if (
            layer is None
            or layer.factors is None
            or layer.rule.NAME != job.variant
            or layer.rank != job.rank
        ):
            has = (
                "does not train"
                if layer is None or layer.factors is None
                else f"has rank {layer.rank} and variant {layer.rule.NAME} for"
            )
            raise FileRefused(
                f"{job.existing} {has} {name}; set rank, variant and layers as they were, or start"
                f" over with existing_lora {NONE}."
            )
    return adapter


def _fill(layers: dict[str, IntLoRALinear], adapter: Adapter) -> None:
    for name, layer in layers.items():
        down, up = adapter.layers[name].factors.floats()
        with torch.no_grad():
            layer.lora_down.copy_(down.T)
            layer.lora_up.copy_(up)


def _data(job: Job, pictures: Dataset, names: list[str], bases: Bases | rounded.Weights) -> str:
    """All that the result depends on besides the options that may change."""
    # R, and so the integers, depend on the seed
    base = [] if job.base == INTEGERS else [job.base, job.options.seed]
    # these change memory, not numbers
    settings = dataclasses.asdict(job.settings) | {"checkpointing": None, "offloading": None}
    return json.dumps(
        [
            pictures.digest(),
            settings,
            job.variant,
            job.rank,
            job.existing,
            names,
            bases.fingerprint(names[0]),
            *base,
        ]
    )


def _existing_result(job: Job, data: str) -> Trained | None:
    """The result of a run with the same inputs that has been saved already."""
    name = files.file_name("", job.filename or "trained")
    if job.overwrite or folders.find(name, files.FOLDER) is None:
        return None
    path = files.path_of(name)
    adapter = file.read(path)
    facts = adapter.facts
    if facts.get("run") != data or len(facts.get("losses", ())) != job.options.steps:
        return None
    chart = curve_chart(
        facts["losses"],
        job.options.steps,
        name,
        "trained already, with the same inputs",
        _summary(adapter, path),
    )
    return Trained(
        name=name, lora=_as_lora(adapter), losses=facts["losses"], steps=facts["steps"], chart=chart
    )


# ---- what it leaves behind


def _chart(job: Job, name: str, losses: list[float], summary: list[tuple[str, str]]) -> dict:
    """The curve so far."""
    facts = (
        f"{job.variant.replace('_', '-').upper()}, rank {job.rank}, {job.options.optimizer},"
        f" {job.options.lr:g}"
    )
    if job.base != INTEGERS:
        facts += f", {job.base}"
    return curve_chart(losses, job.options.steps, name, facts, summary)


def _summary(adapter: Adapter, target: Path) -> list[tuple[str, str]]:
    return [("layers", str(len(adapter.layers))), ("file", size(target.stat().st_size))]


def _as_lora(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The factors under the names of ComfyUI's own training, for Load LoRA Model and Save LoRA
    Weights.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        down, up = layer.factors.floats()
        key = f"diffusion_model.{name}"
        tensors |= {
            f"{key}.lora_up.weight": up,
            f"{key}.lora_down.weight": down.T.contiguous(),
            f"{key}.alpha": torch.tensor(float(layer.rank)),
        }
    return tensors
