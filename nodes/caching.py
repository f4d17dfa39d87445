"""The caching nodes: sample with TeaCache, apply TeaCache or SmoothCache to a model, calibrate a
model for both.
"""

from comfy_api.latest import io

from . import file_nodes, menu
from .bridge.caching import settings
from .bridge.caching.apply import apply_and_show
from .bridge.caching.calibrate import CalibrationJob, calibrate, stamp
from .bridge.caching.calibration_file import FOLDER, open_calibration
from .bridge.caching.measure import Measurement
from .bridge.caching.models import DEPTHS
from .bridge.caching.sample import SamplingJob, sample
from .bridge.caching.settings import AUTO, NONE
from .bridge.host import charts
from .caching_inputs import (
    calibration_widget,
    coefficients_widget,
    expert_widgets,
    teacache_expert_widgets,
    teacache_widgets,
    window_widgets,
)


class _Cached(file_nodes.FileNode):
    """What all nodes that cache check before they run: their window and their calibration."""

    STAMPS = {"calibration": stamp}

    @classmethod
    def validate_inputs(cls, start=0.0, end=1.0, calibration=None):
        first = file_nodes.known(start, (int, float))
        last = file_nodes.known(end, (int, float))
        if first is not None and last is not None and first > last:
            return (
                f"start {first:g} lies behind end {last:g}: nothing would be reused. Choose start"
                " below end."
            )
        if calibration in (AUTO, NONE):
            return True
        return file_nodes.valid_file(open_calibration, calibration)

    @classmethod
    def fingerprint_inputs(cls, calibration=AUTO, **inputs):
        return super().fingerprint_inputs(calibration=calibration, **inputs)


class NibbleTeaCacheSampler(_Cached):
    """SamplerCustomAdvanced with TeaCache and a chart of what it skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleTeaCacheSampler",
            display_name="TeaCache Sampler",
            category=menu.SPEED,
            has_intermediate_output=True,
            description=(
                "Samples like SamplerCustomAdvanced, but skips steps in which little"
                " changes, and shows which ones while it runs."
            ),
            search_aliases=[
                "nibble",
                "teacache",
                "cache",
                "faster sampling",
                "faster",
                "speed up",
                "easycache",
                "SamplerCustomAdvanced",
            ],
            inputs=[
                io.Noise.Input("noise", tooltip="From RandomNoise."),
                io.Guider.Input(
                    "guider",
                    tooltip=(
                        "From BasicGuider, CFGGuider or any other. It brings the model and the"
                        " prompts."
                    ),
                ),
                io.Sampler.Input("sampler", tooltip="From KSamplerSelect."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip=(
                        "From BasicScheduler or any other scheduler. It sets the number of steps."
                    ),
                ),
                io.Latent.Input(
                    "latent_image", tooltip="The empty or encoded latent to start from."
                ),
                *teacache_widgets(),
                io.Boolean.Input(
                    "compare",
                    default=False,
                    tooltip=(
                        "Sample once more without caching, with the same seed, and show how much"
                        " faster and how close the cached run was. Takes the time of that run."
                    ),
                ),
                *teacache_expert_widgets(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "With compare: measures the difference between the pictures instead of"
                        " the latents."
                    ),
                ),
                coefficients_widget(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Latent.Output("output", display_name="output", tooltip="The sampled latent."),
                io.Latent.Output(
                    "denoised_output",
                    display_name="denoised_output",
                    tooltip=(
                        "The model's last estimate of the finished latent; the same as output"
                        " when all noise is removed."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913 (the inputs)
        cls, noise, guider, sampler, sigmas, latent_image, compare, vae=None, **widgets
    ) -> io.NodeOutput:
        done = sample(
            SamplingJob(
                noise=noise,
                guider=guider,
                sampler=sampler,
                sigmas=sigmas,
                latent=latent_image,
                choice=settings.teacache(guider.model_patcher, **widgets),
                compare=compare,
                vae=vae,
                node_id=cls.hidden.unique_id,
            )
        )
        return io.NodeOutput(done.output, done.denoised, ui=charts.ui(done.chart))


class NibbleApplyTeaCache(_Cached):
    """A model that skips steps by TeaCache's rule, for any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleApplyTeaCache",
            display_name="Apply TeaCache",
            category=menu.SPEED,
            has_intermediate_output=True,
            description=(
                "Lets a model skip steps in which little changes, with any sampler and in"
                " any workflow. Shows which ones while a sampler runs."
            ),
            search_aliases=[
                "nibble",
                "teacache",
                "cache",
                "faster sampling",
                "faster",
                "speed up",
                "easycache",
                "wavespeed",
                "first block cache",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any diffusion transformer, in 16 or 4 bits, with its LoRAs."
                ),
                *teacache_widgets(),
                *teacache_expert_widgets(),
                coefficients_widget(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", tooltip="The model with TeaCache applied.")],
        )

    @classmethod
    def execute(cls, model, **widgets) -> io.NodeOutput:
        choice = settings.teacache(model, **widgets)
        cached, chart = apply_and_show(model, choice, cls.hidden.unique_id)
        return io.NodeOutput(cached, ui=charts.ui(chart))


class NibbleApplySmoothCache(_Cached):
    """A model that reuses results on a schedule measured once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleApplySmoothCache",
            display_name="Apply SmoothCache",
            category=menu.SPEED,
            has_intermediate_output=True,
            description=(
                "Lets a model reuse whole steps, blocks or parts of blocks on a schedule"
                " that Calibrate Cache measured: the same steps for every prompt."
            ),
            search_aliases=[
                "nibble",
                "smoothcache",
                "cache",
                "faster sampling",
                "faster",
                "speed up",
                "static cache",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that was calibrated, with any LoRAs."),
                calibration_widget(AUTO),
                io.Float.Input(
                    "alpha",
                    default=0.15,
                    min=0.0,
                    max=3.0,
                    step=0.005,
                    round=0.0001,
                    tooltip=(
                        "The error that a reused result may have, as measured. Higher: faster,"
                        " less close. 0: every step is computed."
                    ),
                ),
                io.Combo.Input(
                    "depth",
                    options=list(DEPTHS),
                    default="step",
                    tooltip=(
                        "What is reused. step: all of the model's work. block: each kind of block"
                        " on its own. sublayer: attention and MLP, each on its own."
                    ),
                ),
                *window_widgets(),
                io.Int.Input(
                    "budget",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip=(
                        "Compute exactly this many steps, the best ones according to the"
                        " calibration; alpha is ignored. 0: use alpha. Only for depth step."
                    ),
                ),
                *expert_widgets(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", tooltip="The model with SmoothCache applied.")],
        )

    @classmethod
    def execute(cls, model, **widgets) -> io.NodeOutput:
        choice = settings.smoothcache(model, **widgets)
        cached, chart = apply_and_show(model, choice, cls.hidden.unique_id)
        return io.NodeOutput(cached, ui=charts.ui(chart))


class NibbleCalibrateCache(file_nodes.FileNode):
    """Measures once how a model changes from step to step, for both methods."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCalibrateCache",
            display_name="Calibrate Cache",
            category=menu.SPEED,
            is_output_node=True,
            description=(
                "Runs your model on your prompts once, measures how it changes from step"
                " to step, and saves the result for TeaCache and SmoothCache."
            ),
            search_aliases=["nibble", "teacache", "smoothcache", "calibrate", "cache"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model to measure, set up as you will sample it: in 4 bits, with its"
                        " LoRAs."
                    ),
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip=(
                        "Prompts to measure on: five to ten, joined with Conditioning (Combine)."
                        " Not the ones that you will sample."
                    ),
                ),
                io.Sampler.Input("sampler", tooltip="The sampler that you will use."),
                io.Sigmas.Input("sigmas", tooltip="The schedule that you will use."),
                io.Latent.Input("latent_image", tooltip="Picture size for the measurement."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The cfg that you will use. 1: without a negative prompt.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    tooltip="Seed for the noise of the measured pictures.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip=(
                        "Name of the file in models/nibble_cache. Empty: made from the model's"
                        " class and the number of steps."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Measure again and replace an existing file of this name.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt, if cfg is not 1."
                ),
                io.Int.Input(
                    "k_max",
                    default=3,
                    min=1,
                    max=8,
                    advanced=True,
                    tooltip="The longest run of reused steps that SmoothCache may choose.",
                ),
                io.Int.Input(
                    "order",
                    default=2,
                    min=1,
                    max=4,
                    advanced=True,
                    tooltip="Degree of TeaCache's polynomial. Published ones have 4; 2 is safer.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "calibration",
                    tooltip="The file's name; connect it to 'calibration' of a sampling node.",
                )
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913 (the inputs)
        cls,
        model,
        positive,
        sampler,
        sigmas,
        latent_image,
        cfg,
        seed,
        filename,
        overwrite,
        k_max,
        order,
        negative=None,
    ) -> io.NodeOutput:
        setup = Measurement(
            model=model,
            positive=positive,
            negative=negative,
            cfg=cfg,
            sampler=sampler,
            sigmas=sigmas,
            latent=latent_image,
            seed=seed,
            k_max=k_max,
            order=order,
        )
        name, chart = calibrate(CalibrationJob(setup, filename, overwrite, cls.hidden.unique_id))
        cls.made(name, FOLDER)
        return io.NodeOutput(name, ui=charts.ui(chart))


NODES = [NibbleTeaCacheSampler, NibbleApplyTeaCache, NibbleApplySmoothCache, NibbleCalibrateCache]
