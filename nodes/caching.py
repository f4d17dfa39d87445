"""The caching nodes: sample with TeaCache, apply TeaCache or SmoothCache to a model, calibrate a
model for both.
"""

from comfy_api.latest import io

from ..quant.files.errors import FileRefused
from .bridge.caching import calibrate as cached_calibration
from .bridge.caching import calibration_file
from .bridge.caching import sample as cached_sampling
from .bridge.caching import settings as choices
from .bridge.caching.apply import PRESETS
from .bridge.host import charts

_DEPTHS = ["step", "block", "sublayer"]


class _Cached(io.ComfyNode):
    """What all nodes that cache check before they run: their window and their calibration."""

    @classmethod
    # values that are linked are not known yet and absent
    def validate_inputs(cls, start=0.0, end=1.0, calibration=None):
        if start > end:
            return (
                f"start {start:g} lies behind end {end:g}: nothing would be reused. Choose start"
                " below end."
            )
        try:
            if calibration is not None and calibration not in (choices.AUTO, choices.NONE):
                calibration_file.open_calibration(calibration)
        except FileRefused as refusal:
            return str(refusal)
        return True

    @classmethod
    def fingerprint_inputs(cls, calibration=choices.AUTO, **_):
        return cached_calibration.stamp(calibration)


class NibbleTeaCacheSampler(_Cached):
    """SamplerCustomAdvanced with TeaCache and a chart of what it skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleTeaCacheSampler",
            display_name="TeaCache Sampler",
            category="Nibble",
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
                *_teacache_widgets(),
                io.Boolean.Input(
                    "compare",
                    default=False,
                    tooltip=(
                        "Sample once more without caching, with the same seed, and show how much"
                        " faster and how close the cached run was. Takes the time of that run."
                    ),
                ),
                *_teacache_expert_widgets(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "With compare: measures the difference between the pictures instead of"
                        " the latents."
                    ),
                ),
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
    def execute(
        cls, noise, guider, sampler, sigmas, latent_image, compare, vae=None, **widgets
    ) -> io.NodeOutput:
        choice = choices.teacache(guider.model_patcher, **widgets)
        done = cached_sampling.run(
            cached_sampling.Job(
                noise,
                guider,
                sampler,
                sigmas,
                latent_image,
                choice,
                compare,
                vae,
                cls.hidden.unique_id,
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
            category="Nibble",
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
                "easycache",
                "first block cache",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any diffusion transformer, in 16 or 4 bits, with its LoRAs."
                ),
                *_teacache_widgets(),
                *_teacache_expert_widgets(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", tooltip="The model with TeaCache applied.")],
        )

    @classmethod
    def execute(cls, model, **widgets) -> io.NodeOutput:
        cached, chart = choices.apply(
            model, choices.teacache(model, **widgets), cls.hidden.unique_id
        )
        return io.NodeOutput(cached, ui=charts.ui(chart))


class NibbleApplySmoothCache(_Cached):
    """A model that reuses results on a schedule measured once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleApplySmoothCache",
            display_name="Apply SmoothCache",
            category="Nibble",
            has_intermediate_output=True,
            description=(
                "Lets a model reuse whole steps, blocks or parts of blocks on a schedule"
                " that Calibrate Cache measured: the same steps for every prompt."
            ),
            search_aliases=["nibble", "smoothcache", "cache", "faster sampling", "static cache"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was calibrated, with any LoRAs."),
                _calibration_widget(choices.AUTO),
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
                    options=_DEPTHS,
                    default="step",
                    tooltip=(
                        "What is reused. step: all of the model's work. block: each kind of block"
                        " on its own. sublayer: attention and MLP, each on its own."
                    ),
                ),
                *_window_widgets(),
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
                *_expert_widgets(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", tooltip="The model with SmoothCache applied.")],
        )

    @classmethod
    def execute(cls, model, **widgets) -> io.NodeOutput:
        cached, chart = choices.apply(
            model, choices.smoothcache(model, **widgets), cls.hidden.unique_id
        )
        return io.NodeOutput(cached, ui=charts.ui(chart))


class NibbleCalibrateCache(io.ComfyNode):
    """Measures once how a model changes from step to step, for both methods."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCalibrateCache",
            display_name="Calibrate Cache",
            category="Nibble",
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
    def fingerprint_inputs(cls, filename, overwrite, **_):
        # unequal to itself: looks for its file each time
        return cached_calibration.stamp(filename) if filename and not overwrite else float("nan")

    @classmethod
    def execute(
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
        name, chart = cached_calibration.run(
            cached_calibration.Job(
                model,
                positive,
                negative,
                cfg,
                sampler,
                sigmas,
                latent_image,
                seed,
                filename,
                overwrite,
                k_max,
                order,
                cls.hidden.unique_id,
            )
        )
        return io.NodeOutput(name, ui=charts.ui(chart))


def _teacache_widgets() -> list:
    """The inputs that everyone sees."""
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, choices.CUSTOM],
            default="balanced",
            tooltip=(
                "Share of the steps computed on the demo model: quality about two thirds,"
                " balanced about half, fast about a third. custom: set by the threshold"
                " below."
            ),
        ),
        io.Float.Input(
            "threshold",
            default=0.03,
            min=0.0,
            max=3.0,
            step=0.005,
            round=0.0001,
            tooltip=(
                "With preset custom: how much error (with rule teacache: change) may"
                " build up before the model is computed again. 0: every step is computed,"
                " bit for bit."
            ),
        ),
        *_window_widgets(),
        _calibration_widget(choices.AUTO, choices.NONE),
    ]


def _window_widgets() -> list:
    return [
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps before this share of the run are always computed.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps after this share of the run are always computed.",
        ),
    ]


def _calibration_widget(*words: str):
    also = (
        " none: the published coefficients for this architecture." if choices.NONE in words else ""
    )
    return io.Combo.Input(
        "calibration",
        options=choices.calibration_names(*words),
        default=words[0],
        tooltip=(
            f"A file from Calibrate Cache. auto: the newest one for this model.{also} Or connect"
            " the output of Calibrate Cache."
        ),
    )


def _teacache_expert_widgets() -> list:
    return [
        io.Combo.Input(
            "rule",
            options=[choices.AUTO, "teacache", "error"],
            default=choices.AUTO,
            advanced=True,
            tooltip=(
                "When to compute again. error: judged by how wrong the guess for the last"
                " computed step was. teacache: judged by the change of the first block's"
                " input, with thresholds as published. auto: the preset's rule."
            ),
        ),
        io.Combo.Input(
            "level",
            options=["auto", "blocks", "step"],
            default="auto",
            advanced=True,
            tooltip=(
                "blocks: the first block decides, the rest is reused. step: decided"
                " before the model runs, for torch.compile of the whole model. auto: as"
                " deep as the model allows."
            ),
        ),
        *_expert_widgets(),
    ]


def _expert_widgets() -> list:
    """The collapsed inputs of every node that reuses results."""
    return [
        io.Combo.Input(
            "extrapolation",
            options=list(choices.ORDERS),
            default="auto",
            advanced=True,
            tooltip=(
                "What a skipped step uses: the last computed result (reuse), or a point"
                " on the line or parabola through the last ones. auto: what was measured"
                " to be closest."
            ),
        ),
        io.Int.Input(
            "first_steps",
            default=1,
            min=0,
            max=100,
            advanced=True,
            tooltip="This many steps at the start are always computed.",
        ),
        io.Int.Input(
            "last_steps",
            default=1,
            min=0,
            max=100,
            advanced=True,
            tooltip="This many steps at the end are always computed.",
        ),
        io.Combo.Input(
            "store",
            options=["gpu", "cpu"],
            default="gpu",
            advanced=True,
            tooltip=(
                "Where results are kept for reuse. gpu: about 25 MB for each prompt of a"
                " 1-megapixel FLUX. cpu: no VRAM, slower steps."
            ),
        ),
    ]


NODES = [NibbleTeaCacheSampler, NibbleApplyTeaCache, NibbleApplySmoothCache, NibbleCalibrateCache]
