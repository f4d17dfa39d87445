"""A trained flow model as a denoiser of every schedule of noise that ComfyUI samples with.

A flow's x0(z, t) is the denoiser of a state x = x0 + sigma n of data of size S, by t = sigma /
(S + sigma), z = x / (S + sigma), as ComfyUI's COSMOS_RFLOW does for S = 1: the same model, exactly,
under each of the ways to mix and to space noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_sampling as kinds
import comfy.samplers


class FromFlow:
    """ComfyUI's model_sampling over a network that was trained as a flow."""

    def timestep(self, sigma):
        return sigma / (self.sigma_data + sigma)

    def calculate_input(self, sigma, noise):
        return noise / (self.sigma_data + kinds.reshape_sigma(sigma, noise.ndim))

    def calculate_denoised(self, sigma, model_output, model_input):
        level = kinds.reshape_sigma(sigma, model_output.ndim)
        state, time = model_input / (self.sigma_data + level), self.timestep(level)
        return self.sigma_data * (state - time * model_output)


class Epsilon(FromFlow, kinds.ModelSamplingDiscrete, kinds.EPS):
    """As Stable Diffusion 1 and XL: sigma to 14.6."""


class Velocity(FromFlow, kinds.ModelSamplingDiscrete, kinds.V_PREDICTION):
    """As v-prediction models: sigma to 4518 with zero terminal SNR."""


class Continuous(FromFlow, kinds.ModelSamplingContinuousEDM, kinds.EDM):
    """As EDM, Playground and SVD."""


class Cosmos(kinds.ModelSamplingCosmosRFlow, kinds.COSMOS_RFLOW):
    """ComfyUI's own, of Cosmos Predict 2 and Anima."""


def continuous(cls: type, least: float, most: float, data: float):
    sampling = cls()
    sampling.set_parameters(least, most, data)
    return sampling


@dataclass(frozen=True)
class Schedule:
    """What is put on a model (None: its own flow), and ComfyUI's scheduler."""

    sampling: Callable | None
    scheduler: str

    def on(self, model):
        """A clone of the model that samples so."""
        model = model.clone()
        if self.sampling is not None:
            model.add_object_patch("model_sampling", self.sampling())
        return model

    def sigmas(self, model, steps: int):
        """steps + 1 noise levels for such a model."""
        return comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), self.scheduler, steps
        )


def cosmos():
    return continuous(Cosmos, 0.002, 80.0, 1.0)


SCHEDULES = {
    "flow": Schedule(None, "simple"),
    "cosmos": Schedule(cosmos, "simple"),
    "cosmos, karras": Schedule(cosmos, "karras"),
    "eps": Schedule(Epsilon, "simple"),
    "eps, karras": Schedule(Epsilon, "karras"),
    "v, zero SNR": Schedule(lambda: Velocity(zsnr=True), "simple"),
    "EDM": Schedule(lambda: continuous(Continuous, 0.002, 80.0, 0.5), "karras"),
    "SVD": Schedule(lambda: continuous(Continuous, 0.002, 700.0, 1.0), "karras"),
}
