"""The shipped demo model's prompt: its stand-in for a text encoder."""

from comfy_api.latest import io

from ..demo import prompts, world
from . import menu
from .file_nodes import known


class NibbleDemoPrompt(io.ComfyNode):
    """A sentence of the demo's picture world → CONDITIONING for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleDemoPrompt",
            display_name="Demo Prompt",
            category=menu.DEMO,
            description=(
                f"A prompt for Nibble's small demo model. Colors: {', '.join(world.COLOURS)}."
                f" Shapes: {', '.join(world.SHAPES)}. Places: {', '.join(world.PLACES)}."
                f" Backgrounds: {', '.join(world.BACKGROUNDS)}."
            ),
            search_aliases=["nibble", "demo", "try", "example"],
            inputs=[
                io.String.Input(
                    "text",
                    default="a red circle top left on black",
                    tooltip=(
                        "A color, a shape, a place and a background, such as: a green star bottom"
                        " right on navy"
                    ),
                )
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For the demo model only.")],
        )

    @classmethod
    def validate_inputs(cls, text=None):
        typed = known(text, str)
        try:
            if typed is not None:
                world.parse(typed)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        tokens, pooled = prompts.embed(prompts.word_indices([text]))
        return io.NodeOutput([[tokens, {"pooled_output": pooled, "guidance": 3.5}]])


NODES = [NibbleDemoPrompt]
