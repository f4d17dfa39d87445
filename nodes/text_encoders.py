"""The nodes of text encoders: make a 4-bit file, load one."""

from comfy_api.latest import io

from ..quant.svdquant.recipe import Recipe
from . import file_nodes, menu, widgets
from .bridge.host import charts, folders
from .bridge.quantize import text_encoder
from .bridge.quantize.text_encoder import TextEncoderRequest
from .bridge.quantized import encoders

NO_SOURCES = "(no text encoders in models/text_encoders)"
NONE = "none"
_PRESETS = {
    "fast": "Needs no data: reads the weights alone. Takes minutes.",
    "best": (
        "Runs the 16-bit encoder on prompts and fits the rounding to what its layers read (GPTQ)."
        " Closest to it; it has to fit in memory."
    ),
}
_FORMATS = {
    "w4a16": "4-bit weights, 16-bit inputs",
    "w4a8": "4-bit weights of 16 free levels, 8-bit inputs: the same size, closer to 16 bit",
}


def _recipe(preset: str, format: str, keep_layers: str, seed: int) -> Recipe:
    options: dict = {"keep": widgets.patterns(keep_layers), "seed": seed}
    if format == "w4a8":
        options |= {"format": "svdquant_w4a8", "rank": 0}
    return Recipe.from_preset(preset, **options)


def _stamp(name: str) -> str:
    return folders.stamp(name, encoders.FOLDER)


class NibbleQuantizeTextEncoder(file_nodes.FileNode):
    """Quantizes a text encoder to 4 bits."""

    STAMPS = {"clip_name": _stamp}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeTextEncoder",
            display_name="Quantize Text Encoder",
            category=menu.TEXT_ENCODER,
            is_output_node=True,
            description=(
                "Makes a 4-bit copy of a text encoder (T5, Qwen, Gemma, Llama, Mistral) beside the"
                " original and shows how close its conditioning is. An interrupted run resumes"
                " where it stopped."
            ),
            search_aliases=[
                "nibble",
                "quantize",
                "text encoder",
                "clip",
                "t5",
                "qwen",
                "gemma",
                "4bit",
                "low vram",
                "8gb",
            ],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=text_encoder.sources() or [NO_SOURCES],
                    tooltip="A 16-bit, fp8 or GGUF text encoder in models/text_encoders.",
                ),
                widgets.preset_input(_PRESETS),
                *widgets.target_inputs("-<format>"),
                io.Combo.Input(
                    "format",
                    options=list(_FORMATS),
                    default="w4a8",
                    advanced=True,
                    tooltip=" ".join(f"{name}: {text}." for name, text in _FORMATS.items()),
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip=(
                        "Prompts to calibrate on, one per line; a quarter of few, an eighth of many"
                        " only judge. Empty: two dozen of Nibble's own."
                    ),
                ),
                widgets.keep_layers_input(),
                io.Float.Input(
                    "memory_gb",
                    default=4.0,
                    min=0.25,
                    max=256.0,
                    step=0.25,
                    advanced=True,
                    tooltip=(
                        "Memory for the measurements, in GB. With less, the prompts are run more"
                        " often; the result is the same."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Seed for every random choice.",
                ),
                _type_input(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "clip_name",
                    tooltip="The new file's name; connect it to Load Quantized CLIP or CLIPLoader.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_name=None):
        return file_nodes.valid_file(lambda name: folders.path_of(name, encoders.FOLDER), clip_name)

    @classmethod
    def execute(  # noqa: PLR0913  (its widgets)
        cls, preset, format, type, prompts, keep_layers, seed, **request
    ) -> io.NodeOutput:
        recipe = _recipe(preset, format, keep_layers, seed)
        name, report, close = TextEncoderRequest(
            recipe=recipe,
            kind=type,
            prompts=widgets.patterns(prompts),
            node_id=cls.hidden.unique_id,
            **request,
        ).run()
        cls.made(name, encoders.FOLDER)
        chart = charts.layers_chart(report, name, f"{format}, {preset}")
        words = close.in_words() if close else "not compared: 16 bit cannot be run here"
        chart["summary"] = encoders.of_prompts(chart["summary"])
        chart["summary"].insert(1, ["conditioning", words])
        return io.NodeOutput(name, ui=charts.ui(chart))


def _type_input() -> io.Combo.Input:
    return io.Combo.Input(
        "type",
        options=list(encoders.TYPES),
        default="auto",
        advanced=True,
        optional=True,
        tooltip=(
            "What the encoder is for, as in CLIPLoader. auto: what it is used with most, by its"
            " file."
        ),
    )


class NibbleLoadCLIP(file_nodes.FileNode):
    """Loads one to four text encoders, any of them quantized."""

    STAMPS = {f"clip_name{number}": _stamp for number in (1, 2, 3, 4)}

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.names(encoders.FOLDER)

        def another(number: int, tooltip: str) -> io.Combo.Input:
            return io.Combo.Input(
                f"clip_name{number}",
                options=[NONE, *names],
                default=NONE,
                optional=True,
                tooltip=tooltip,
            )

        return io.Schema(
            node_id="NibbleLoadCLIP",
            display_name="Load Quantized CLIP",
            category=menu.TEXT_ENCODER,
            has_intermediate_output=True,
            description=(
                "Loads text encoders made by Quantize Text Encoder, alone or beside others in any"
                " format that ComfyUI loads. It works like any other CLIP: prompts, LoRA, pictures."
            ),
            search_aliases=[
                "nibble",
                "clip loader",
                "dual clip",
                "triple clip",
                "load clip",
                "text encoder",
                "t5",
                "gguf",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "clip_name1",
                    options=names or [NO_SOURCES],
                    tooltip="A text encoder in models/text_encoders, quantized or not.",
                ),
                another(2, "A second encoder, where the model has two, such as CLIP-L beside T5."),
                another(3, "A third encoder, where the model has three (SD3)."),
                _type_input(),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    optional=True,
                    tooltip="Where the encoder runs. cpu: no VRAM at all, slower.",
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    advanced=True,
                    optional=True,
                    tooltip="Check every tensor of Nibble's files against its checksum before use.",
                ),
                # behind the others: old workflows store values by place
                another(4, "A fourth encoder, where the model has four (HiDream)."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Clip.Output("clip", tooltip="The text encoder.")],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None):
        return file_nodes.valid_file(
            lambda name: folders.path_of(name, encoders.FOLDER), clip_name1
        )

    @classmethod
    def execute(  # noqa: PLR0913  (its widgets)
        cls,
        clip_name1,
        clip_name2=NONE,
        clip_name3=NONE,
        type="auto",
        device="default",
        verify=True,
        clip_name4=NONE,
    ) -> io.NodeOutput:
        given = (clip_name1, clip_name2, clip_name3, clip_name4)
        names = [name for name in given if name != NONE]
        clip, kind = encoders.load(names, type, device, verify)
        return io.NodeOutput(clip, ui=charts.ui(encoders.chart(names, kind, clip)))


NODES = [NibbleQuantizeTextEncoder, NibbleLoadCLIP]
