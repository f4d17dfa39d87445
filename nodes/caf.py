"""The CAF nodes: a trained pair of heads on a model, its sampler and inversion; and, without any
training, a SAMPLER and SIGMAS.
"""

from comfy_api.latest import io

from . import file_nodes, menu
from .bridge.caf import invert, load, sample, training_free
from .bridge.host import charts

NO_FILES = "(no CAF files yet)"


class NibbleLoadCAF(file_nodes.FileNode):
    """A flow model with the velocity and acceleration heads of a CAF file."""

    STAMPS = {"caf_name": load.stamp}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadCAF",
            display_name="Load CAF Model",
            category=menu.FEW_STEPS,
            has_intermediate_output=True,
            description=(
                "Adds the two heads from Train CAF to the model that they were trained"
                " on, so that CAF Sampler needs only a few steps. The connected model is"
                " never changed."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "constant acceleration flow",
                "few steps",
                "distilled",
                "load caf",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model that the heads were trained on, in 16 or 4 bits, with any LoRAs."
                    ),
                ),
                io.Combo.Input(
                    "caf_name",
                    options=load.files() or [NO_FILES],
                    tooltip="A file in models/caf, from Train CAF.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    tooltip=(
                        "For CAF Sampler, CAF Invert and the guider. With any other sampler, only"
                        " the velocity head is active."
                    ),
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, caf_name=None):
        return file_nodes.valid_file(load.path_of, caf_name)

    @classmethod
    def execute(cls, model, caf_name) -> io.NodeOutput:
        with_heads = load.load(model, caf_name)
        return io.NodeOutput(with_heads, ui=charts.ui(load.chart(load.heads_of(with_heads))))


class NibbleCAFSampler(io.ComfyNode):
    """Constant Acceleration Flow's sampling, as a SAMPLER with SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCAFSampler",
            display_name="CAF Sampler",
            category=menu.FEW_STEPS,
            has_intermediate_output=True,
            description=(
                "Samples in few steps with a model from Load CAF Model: one call finds"
                " the velocity at the start of the path, then each step finds how it"
                " changes. N steps take N + 1 model calls."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "constant acceleration flow",
                "few steps",
                "faster",
                "speed up",
                "sampler",
                "sigmas",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load CAF Model; the guider needs it too."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip=("N steps take N + 1 model calls; with a velocity connected, N."),
                ),
                io.Custom("CAF_VELOCITY").Input(
                    "velocity",
                    optional=True,
                    tooltip=(
                        "From CAF Invert: generates the inverted picture again or, with another"
                        " prompt, a variation of it."
                    ),
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "The share of the path to sample. Below 1: image to image, from the"
                        " latent with noise added."
                    ),
                ),
                _ahead(),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler",
                    tooltip=(
                        "For SamplerCustomAdvanced. It also works with the sigmas of any scheduler."
                    ),
                ),
                io.Sigmas.Output(
                    "sigmas",
                    tooltip="The steps, evenly spaced along the path, for SamplerCustomAdvanced.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, steps, denoise, velocity=None, ahead=sample.AHEAD) -> io.NodeOutput:
        sigmas = sample.sigmas(model, steps, denoise)
        return io.NodeOutput(
            sample.sampler(velocity, ahead),
            sigmas,
            ui=charts.ui(sample.chart(model, sigmas, velocity)),
        )


class NibbleCAFInvert(io.ComfyNode):
    """A picture's noise and initial velocity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCAFInvert",
            display_name="CAF Invert",
            category=menu.FEW_STEPS,
            has_intermediate_output=True,
            description=(
                "Finds the noise that a picture comes from, and the velocity of its path."
                " With both, CAF Sampler generates the picture again or, with another"
                " prompt, edits it."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "inversion",
                "invert",
                "unsampler",
                "edit",
                "reconstruct",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load CAF Model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip=("What the picture shows. To edit it, give the guider another prompt."),
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The picture, encoded with VAE Encode and this model's VAE.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="N steps take N + 1 model calls. More: closer to the picture.",
                ),
                _ahead(),
            ],
            outputs=[
                io.Noise.Output(
                    "noise", tooltip="For SamplerCustomAdvanced, instead of RandomNoise."
                ),
                io.Custom("CAF_VELOCITY").Output("velocity", tooltip="For CAF Sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent_image, steps, ahead=sample.AHEAD) -> io.NodeOutput:
        noise, velocity = invert.invert(model, positive, latent_image, steps, ahead)
        return io.NodeOutput(noise, velocity, ui=charts.ui(invert.chart(noise, velocity, steps)))


class NibbleConstantAcceleration(io.ComfyNode):
    """The second-order Adams-Bashforth sampler, also in its last step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleConstantAcceleration",
            display_name="Constant-Acceleration Sampler",
            category=menu.FEW_STEPS,
            description=(
                "A sampler for rectified-flow models (FLUX, SD3, Qwen-Image, Wan) that"
                " assumes the velocity keeps changing as it did in the last step: the"
                " second-order Adams-Bashforth method. No training; one model call per"
                " step."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "constant acceleration",
                "adams-bashforth",
                "ab2",
                "lms",
                "sampler",
                "few steps",
                "faster",
                "speed up",
            ],
            inputs=[
                io.Float.Input(
                    "limit",
                    default=training_free.LIMIT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    advanced=True,
                    tooltip=(
                        "How far a step may differ from Euler's, as a share of the velocity. 0:"
                        " Euler's method. 1: hardly ever limited."
                    ),
                )
            ],
            outputs=[
                io.Sampler.Output("sampler", tooltip="For SamplerCustomAdvanced or SamplerCustom.")
            ],
        )

    @classmethod
    def execute(cls, limit) -> io.NodeOutput:
        return io.NodeOutput(training_free.sampler(limit))


class NibbleCAFSigmas(io.ComfyNode):
    """Sigmas spaced as a path of constant acceleration would have them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCAFSigmas",
            display_name="CAF Sigmas",
            category=menu.FEW_STEPS,
            description=(
                "Moves the sigmas of a rectified-flow model to where a path of constant"
                " acceleration would be at those times. The first and last sigma and the"
                " number of steps stay the same."
            ),
            search_aliases=["nibble", "caf", "sigmas", "scheduler", "constant acceleration"],
            inputs=[
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="From any scheduler node, for a model whose sigmas run from 1 to 0.",
                ),
                io.Float.Input(
                    "h",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "Speed at the start of a path, relative to its mean. 1: sigmas unchanged."
                        " Above 1: longer steps near the noise, shorter ones near the picture."
                        " Below 1: the reverse."
                    ),
                ),
            ],
            outputs=[
                io.Sigmas.Output("sigmas", tooltip="The same number of sigmas, spaced differently.")
            ],
        )

    @classmethod
    def execute(cls, sigmas, h) -> io.NodeOutput:
        moved = training_free.retimed(sigmas, h)
        return io.NodeOutput(moved, ui=charts.ui(training_free.chart(sigmas, moved)))


def _ahead() -> io.Float.Input:
    return io.Float.Input(
        "ahead",
        default=sample.AHEAD,
        min=0.0,
        max=1.0,
        step=0.05,
        round=0.001,
        advanced=True,
        optional=True,
        tooltip=(
            "Where in a step the model is asked for the acceleration. 0: at the"
            " start, as in the paper. 0.5: halfway, where the model sees more."
        ),
    )


NODES = [
    NibbleLoadCAF,
    NibbleCAFSampler,
    NibbleCAFInvert,
    NibbleConstantAcceleration,
    NibbleCAFSigmas,
]
