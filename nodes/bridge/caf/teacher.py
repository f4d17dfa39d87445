"""The teacher of Make CAF Couplings: model, prompt, sampler and sigmas, as a deterministic map from
noise to pictures; checked before work starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....accel.caf import couplings
from ..host.samplers import sampler_name
from .straight import coordinates_of

NODE = "Make CAF Couplings"
DEFAULT = "couplings"  # the folder's name where none is given
_KEY = "nibble_couplings"  # of the wrapper on the clone of the model


@dataclass(frozen=True)
class CouplingsJob:
    """What the user asked for. positive: CONDITIONINGs, each entry a prompt; latents: LATENTs, of
    one size; count: pairs; batch: pairs at a time.
    """

    model: ModelPatcher
    positive: list[list]
    latents: list[dict]
    sampler: comfy.samplers.Sampler
    sigmas: Tensor
    count: int
    seed: int
    filename: str = DEFAULT
    negative: list[list] | None = None
    cfg: float = 1.0
    batch: int = 1
    overwrite: bool = False
    node_id: str | None = None


def teacher_name(sampler: object) -> str:
    return sampler_name(sampler) or type(sampler).__name__


def check_teacher(job: CouplingsJob) -> None:
    """Raises ValueError in plain words unless model, sampler and sigmas are a deterministic map
    from noise to pictures.
    """
    sampling = job.model.get_model_object("model_sampling")
    largest = coordinates_of(sampling, NODE).largest
    _check_sigmas(job.sigmas.tolist(), 1.0 if largest is None else largest)
    if not sampling.noise_scaling(job.sigmas[:1].cpu(), torch.ones(1, 1), torch.zeros(1, 1)).any():
        raise ValueError(
            f"{NODE} needs a model that starts from noise; this one turns one picture into another."
        )
    check_sampler(job)


def _check_sigmas(levels: list[float], largest: float) -> None:
    if len(levels) < 2:
        raise ValueError(
            "The sigmas have no steps; connect a scheduler, such as BasicScheduler, with all steps"
            " of the teacher."
        )
    if abs(levels[0] / largest - 1) > 0.01:
        raise ValueError(
            f"The sigmas begin at {levels[0]:.4g}, and pairs begin at pure noise, which is"
            f" {largest:.4g};"
            " connect those of a whole run: a scheduler of this model with denoise 1, not split."
        )
    if abs(levels[-1]) > 1e-3:
        raise ValueError(
            f"The sigmas end at {levels[-1]:.4g}, where noise is left in the picture; connect those"
            " of a whole run, which end at 0."
        )
    if any(after > before for before, after in zip(levels, levels[1:], strict=False)):
        raise ValueError(
            f"The sigmas rise on their way; connect those of one run, from {largest:.4g} to 0."
        )


class _Toy:
    """Stands for a model, to try samplers on: the picture is a curve of whatever it is shown, value
    by value.
    """

    def __init__(self, patcher: ModelPatcher, cfg: float):
        self.model_patcher, self.cfg = patcher, cfg
        self.inner_model = SimpleNamespace(
            model_sampling=patcher.get_model_object("model_sampling")
        )

    def __call__(
        self, x: Tensor, sigma: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        return comfy.samplers.cfg_function(
            self,
            torch.sin(4 * x) / 2,
            torch.sin(3 * x) / 2,
            self.cfg,
            x,
            sigma,
            model_options or {},
            [],
            [],
        )


def check_sampler(job: CouplingsJob) -> None:
    """Raises ValueError unless the sampler makes one picture of one noise: tried on a toy, so that
    no list of names is needed.
    """
    name = teacher_name(job.sampler)
    noise = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 3.0]
    ).reshape(2, 1, 1, 1)
    try:
        one = _tried(job, noise[:1], 1)
        other = _tried(job, noise[:1], 2)
        both = _tried(job, noise, 1)
    except Exception as error:  # whatever a sampler of another pack may raise
        raise ValueError(
            f"The sampler {name} could not be tried out ({type(error).__name__}: {error}); connect"
            " KSamplerSelect with euler, heun, dpmpp_2m or uni_pc."
        ) from error
    if not _near(one, other):
        raise ValueError(
            f"The sampler {name} adds noise on its way, so that one noise can become many pictures;"
            " connect one that adds none, such as euler, heun, dpmpp_2m or uni_pc."
        )
    if job.batch > 1 and not _near(one, both[:1]):
        raise ValueError(
            f"The sampler {name} chooses its steps for a whole batch, so that each picture depends"
            " on its neighbors; set batch_size to 1, or connect another sampler."
        )


def _tried(job: CouplingsJob, noise: Tensor, seed: int) -> Tensor:
    """What the sampler makes of noise, without a trace in torch's own random numbers."""
    model, sigmas = _Toy(job.model, job.cfg), job.sigmas.detach().cpu().float()
    with torch.random.fork_rng(devices=[]):
        # for those that draw from torch's own; a GPU's is left alone
        torch.default_generator.manual_seed(seed)
        return job.sampler.sample(
            model,
            sigmas,
            {"model_options": {}, "seed": seed},
            None,
            noise.clone(),
            torch.zeros_like(noise),
            None,
            True,
        )


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


class Teacher:
    """The connected model, prompt, sampler and sigmas, as a map from noise to data. The MODEL
    itself is left as it is.
    """

    def __init__(self, job: CouplingsJob, empty: Tensor, negative: list | None):
        self.job = job
        self.empty = empty
        self.negative = negative
        self._ends: list[Tensor] = []
        own = job.model.clone()
        own.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, self._between)
        self.guider = comfy.samplers.CFGGuider(own)
        self.guider.set_cfg(job.cfg)

    def _between(self, executor, guider, sigmas, extra_args, callback, noise, *rest, **options):
        """SAMPLER_SAMPLE, around the sampler itself: what it begins with, and what it ends with."""
        sampling, first = guider.inner_model.model_sampling, sigmas[:1]
        start = sampling.noise_scaling(
            first, noise, torch.zeros_like(noise), self.job.sampler.max_denoise(guider, sigmas)
        )
        start = coordinates_of(sampling).straight(start, first)
        data = executor(guider, sigmas, extra_args, callback, noise, *rest, **options)
        self._ends = [end.float().cpu() for end in (start, data)]
        return data

    def draw(self, prompt: list, pairs: list[int], callback: Callable) -> tuple[Tensor, Tensor]:
        """(noise, data) (batch, …) float32 on the CPU, of pairs of one prompt: the ends of straight
        lines.
        """
        conds = {"positive": [prompt]}
        if self.negative is not None:
            conds["negative"] = self.negative
        self.guider.inner_set_conds(conds)
        noise = torch.cat(
            [couplings.noise(self.job.seed, pair, self.empty.shape[1:]) for pair in pairs]
        )
        self.guider.sample(
            noise,
            torch.zeros_like(noise),
            self.job.sampler,
            self.job.sigmas,
            callback=callback,
            disable_pbar=True,
            seed=self.job.seed,
        )
        start, data = self._ends
        return start, data
