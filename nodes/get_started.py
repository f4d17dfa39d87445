"""The Get Started node: what fits on this computer, and what to do first."""

from comfy_api.latest import io

from . import menu
from .bridge.host import charts
from .bridge.quantize import get_started, vram_plan

FIRST = next(iter(get_started.PICKS))
TEMPLATE = "nibble_template"  # where web/get_started.mjs finds the template's name


class NibbleGetStarted(io.ComfyNode):
    """Looks at the computer and says where to begin."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleGetStarted",
            display_name="Get Started",
            category=menu.START,
            is_output_node=True,
            description=(
                "Looks at your graphics card, RAM and model folders and says which model fits, what"
                " is missing for it and how long quantizing takes; a button opens the template."
                " Nothing is loaded or made."
            ),
            search_aliases=[
                "nibble",
                "get started",
                "start here",
                "help",
                "setup",
                "which model",
                "8gb",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "goal",
                    options=list(get_started.PICKS),
                    default=FIRST,
                    optional=True,
                    tooltip="What you want to make.",
                ),
                io.Combo.Input(
                    "card",
                    options=list(vram_plan.CARDS),
                    default=vram_plan.THIS,
                    optional=True,
                    tooltip="Memory of the graphics card, to ask for another computer.",
                ),
            ],
            outputs=[io.String.Output("steps", tooltip="What to do, one step a line.")],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, goal=FIRST, card=vram_plan.THIS) -> io.NodeOutput:
        steps, template, chart = get_started.advise(goal, card)
        return io.NodeOutput(steps, ui=charts.ui(chart) | {TEMPLATE: [template]})


NODES = [NibbleGetStarted]
