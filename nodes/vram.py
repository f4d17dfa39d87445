"""The VRAM Plan node: what a picture will take of a graphics card, before anything is made."""

from comfy_api.latest import io

from ..quant.files.memory.stages import Work
from . import menu, widgets
from .bridge.host import charts
from .bridge.quantize import vram_plan


class NibbleVRAMPlan(io.ComfyNode):
    """Plans the memory of encoding, sampling and decoding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleVRAMPlan",
            display_name="VRAM Plan",
            category=menu.START,
            is_output_node=True,
            description=(
                "Shows what encoding the prompt, sampling and decoding will take of a graphics card"
                " and of RAM, what to switch so that it fits, and what each switch costs. Reads"
                " files' headers alone: nothing is loaded or made."
            ),
            search_aliases=[
                "nibble",
                "memory",
                "vram",
                "8 GB",
                "8gb",
                "out of memory",
                "oom",
                "low vram",
                "how much vram",
            ],
            inputs=[*_main_inputs(), *_more_inputs()],
            not_idempotent=True,
        )

    @classmethod
    def execute(  # noqa: PLR0913 - its widgets
        cls,
        card,
        model_name,
        text_encoder,
        vae,
        width,
        height,
        text_encoder_2=vram_plan.NONE,
        text_encoder_3=vram_plan.NONE,
        loras="",
        batch_size=1,
        frames=1,
        references=0,
        ram_gb=16.0,
    ) -> io.NodeOutput:
        encoders = (text_encoder, text_encoder_2, text_encoder_3)
        loaded = vram_plan.loadout(model_name, encoders, vae, widgets.patterns(loras))
        work = Work(
            size=(width, height),
            pictures=batch_size,
            frames=frames,
            references=references,
            card=vram_plan.card_of(card),
            ram=vram_plan.ram_of(ram_gb),
        )
        plan = vram_plan.plan(loaded, work)
        return io.NodeOutput(ui=charts.ui(vram_plan.chart(plan, f"{model_name} on {card}")))


def _main_inputs() -> list[io.Input]:
    """What everyone sees."""
    return [
        io.Combo.Input(
            "card",
            options=list(vram_plan.CARDS),
            default="8 GB",
            tooltip=(
                "Memory of the graphics card. 1 GB of it is left to the desktop and the driver."
                " cpu: no card, everything in RAM."
            ),
        ),
        io.Combo.Input(
            "model_name",
            options=vram_plan.model_names(),
            tooltip=(
                "A model in models/diffusion_models, quantized or not, or a published one by its"
                " size, before it is downloaded."
            ),
        ),
        io.Combo.Input(
            "text_encoder",
            options=vram_plan.encoder_names(),
            tooltip=(
                "A text encoder in models/text_encoders. as published: those of the published model"
                " that is chosen."
            ),
        ),
        io.Combo.Input(
            "vae",
            options=vram_plan.vae_names(),
            tooltip="A VAE in models/vae. as published: that of the published model.",
        ),
        *(
            io.Int.Input(
                edge,
                default=1024,
                min=16,
                max=16384,
                step=16,
                tooltip=f"The picture's {edge}, in pixels.",
            )
            for edge in ("width", "height")
        ),
    ]


def _more_inputs() -> list[io.Input]:
    """Everything else, collapsed."""
    more_encoders = [name for name in vram_plan.encoder_names() if name != vram_plan.AS_PUBLISHED]
    return [
        *(
            io.Combo.Input(
                f"text_encoder_{number}",
                options=more_encoders,
                default=vram_plan.NONE,
                advanced=True,
                optional=True,
                tooltip="Another text encoder that is loaded with the first.",
            )
            for number in (2, 3)
        ),
        io.String.Input(
            "loras",
            default="",
            multiline=True,
            advanced=True,
            optional=True,
            tooltip="LoRAs on the model: names of files in models/loras, one per line.",
        ),
        _count("batch_size", 1, "Pictures that are sampled together."),
        _count("frames", 1, "Frames of a video; 1 for a picture."),
        _count("references", 0, "Pictures that the model looks at, as FLUX Kontext does."),
        io.Float.Input(
            "ram_gb",
            default=16.0,
            min=0.0,
            max=4096.0,
            step=1.0,
            advanced=True,
            optional=True,
            tooltip="Memory of the computer, in GB. 0: that of this one.",
        ),
    ]


def _count(name: str, least: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        name, default=least, min=least, max=4096, advanced=True, optional=True, tooltip=tooltip
    )


NODES = [NibbleVRAMPlan]
