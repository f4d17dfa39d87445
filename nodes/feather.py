"""FEATHER's nodes: prune a vision-language encoder's visual tokens, see which were kept."""

from comfy_api.latest import io

from ..accel.feather import CRITERIA
from . import menu
from .bridge.feather.prune import MODES
from .bridge.feather.report import PruneChoice, attach, report
from .bridge.host import charts


class NibbleFeatherPrune(io.ComfyNode):
    """A vision-language text encoder that drops most of the image's tokens on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleFeatherPrune",
            display_name="FEATHER Prune Vision Tokens",
            category=menu.TEXT_ENCODER,
            description=(
                "Lets a vision-language text encoder (Qwen2.5-VL, Qwen3-VL, Gemma 3,"
                " LLaVA-Llama 3) drop the image patches that the prompt does not ask about,"
                " and shows which ones it keeps. For Qwen-Image-Edit, HunyuanVideo and text"
                " generation."
            ),
            search_aliases=[
                "nibble",
                "feather",
                "fastv",
                "prune",
                "visual tokens",
                "vision tokens",
                "qwen image edit",
                "qwen vl",
                "gemma",
                "llava",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "A text encoder that reads pictures: Qwen2.5-VL, Qwen3-VL, Gemma 3 or"
                        " HunyuanVideo's LLaVA-Llama 3."
                    ),
                ),
                io.Float.Input(
                    "keep",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip=(
                        "Share of the image's patches that the first stage keeps. Of those, the"
                        " second stage keeps this share squared. 1: the encoder unchanged, bit"
                        " for bit."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="scatter",
                    tooltip=(
                        "scatter: pruned patches stay in the conditioning as they were when they"
                        " were pruned. drop: they are removed, so the diffusion model works on"
                        " fewer tokens too."
                    ),
                ),
                io.Combo.Input(
                    "criterion",
                    options=list(CRITERIA),
                    default="feather",
                    advanced=True,
                    tooltip=(
                        "feather: attention of the last token without rotary positions, plus a"
                        " grid. fastv: with rotary positions, which favors the bottom of the"
                        " picture; for comparison. uniform: evenly spaced patches."
                    ),
                ),
                io.Int.Input(
                    "stride",
                    default=3,
                    min=0,
                    max=16,
                    advanced=True,
                    tooltip=(
                        "The first stage also keeps every nth patch in both directions, n being"
                        " this number. 0: no grid. Only for feather."
                    ),
                ),
                io.Int.Input(
                    "first_layer",
                    default=0,
                    min=0,
                    max=200,
                    advanced=True,
                    tooltip="The first stage runs before this layer. 0: at a quarter of the depth.",
                ),
                io.Int.Input(
                    "second_layer",
                    default=0,
                    min=0,
                    max=200,
                    advanced=True,
                    tooltip="The second stage runs before this layer. 0: at half of the depth.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Clip.Output(
                    "clip", tooltip="The encoder with pruning. The connected one stays as it is."
                )
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913 (the inputs)
        cls, clip, keep, mode, criterion, stride, first_layer, second_layer
    ) -> io.NodeOutput:
        choice = PruneChoice(
            keep=keep,
            mode=mode,
            criterion=criterion,
            stride=stride,
            first=first_layer,
            second=second_layer,
        )
        pruned, plan = attach(clip, choice, cls.hidden.unique_id)
        return io.NodeOutput(pruned, ui=charts.ui(plan))


class NibbleFeatherReport(io.ComfyNode):
    """Which patches a conditioning was made of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleFeatherReport",
            display_name="FEATHER Report",
            category=menu.TEXT_ENCODER,
            is_output_node=True,
            description=(
                "Shows which image patches FEATHER kept for a conditioning: the picture"
                " with pruned patches darkened, and the tokens and operations before and"
                " after."
            ),
            search_aliases=["nibble", "feather", "report", "visual tokens", "attention map"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "A prompt with an image, encoded by a CLIP from FEATHER Prune Vision"
                        " Tokens."
                    ),
                )
            ],
            outputs=[
                io.Image.Output(
                    "image", tooltip="The prompt's pictures, with pruned patches darkened."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning) -> io.NodeOutput:
        drawn, chart = report(conditioning)
        return io.NodeOutput(drawn, ui=charts.ui(chart))


NODES = [NibbleFeatherPrune, NibbleFeatherReport]
