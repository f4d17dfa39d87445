"""Constant acceleration's nodes: a second-order SAMPLER for rectified-flow models, and SIGMAS at another pace."""

from comfy_api.latest import io

from .bridge import caf, charts


class NibbleConstantAcceleration(io.ComfyNode):
    """The second-order Adams-Bashforth step, kept through the last one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleConstantAcceleration", display_name="Constant-Acceleration Sampler", category="Nibble",
            description="A sampler for rectified-flow models (FLUX, SD3, Qwen-Image, Wan) that takes the last change of velocity to go on through the next "
                        "step: the second-order Adams-Bashforth method, without training, at one call of the model a step.",
            search_aliases=["nibble", "caf", "constant acceleration", "adams-bashforth", "ab2", "lms", "sampler"],
            inputs=[io.Float.Input("limit", default=caf.LIMIT, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                                   tooltip="The most by which a step may differ from Euler's, as a share of the velocity. 0: Euler's method. 1: hardly "
                                           "ever limited.")],
            outputs=[io.Sampler.Output("sampler", tooltip="For SamplerCustomAdvanced or SamplerCustom.")])

    @classmethod
    def execute(cls, limit) -> io.NodeOutput:
        return io.NodeOutput(caf.sampler(limit))


class NibbleCAFSigmas(io.ComfyNode):
    """Sigmas spaced as a path of constant acceleration would have them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleCAFSigmas", display_name="CAF Sigmas", category="Nibble",
            description="Moves the sigmas of a rectified-flow model to where a path of constant acceleration would be at those times. First, last and number "
                        "of steps stay.",
            search_aliases=["nibble", "caf", "sigmas", "scheduler", "constant acceleration"],
            inputs=[io.Sigmas.Input("sigmas", tooltip="From any scheduler node, for a model whose sigmas run from 1 to 0."),
                    io.Float.Input("h", default=1.0, min=0.0, max=2.0, step=0.05, round=0.001,
                                   tooltip="Speed at the beginning, over the mean. 1: sigmas as they are. Above: longer steps near the noise, shorter ones "
                                           "near the picture. Below: the other way.")],
            outputs=[io.Sigmas.Output("sigmas", tooltip="As many sigmas, at another pace.")])

    @classmethod
    def execute(cls, sigmas, h) -> io.NodeOutput:
        moved = caf.retimed(sigmas, h)
        return io.NodeOutput(moved, ui=charts.ui(caf.chart(sigmas, moved)))


NODES = [NibbleConstantAcceleration, NibbleCAFSigmas]
