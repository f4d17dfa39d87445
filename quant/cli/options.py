"""The options of the commands: argparse alone, so that --help does not wait for torch."""

import argparse
from collections.abc import Callable
from pathlib import Path

from . import partials


def add_commands(commands, examples: str, small_file: Callable[[Path, bool], dict | None]) -> None:
    """Adds quantize, inspect, plan and convert to a parser's subcommands.

    examples    printed below each one's options
    small_file  for `inspect`
    """

    def command(name: str, text: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=text, epilog=examples, formatter_class=raw)

    quantize = command("quantize", "make the quantized file of a model")
    quantize_options(quantize)
    quantize.set_defaults(run=_quantize)
    inspect = command("inspect", "show what a file holds, or what quantizing it would give")
    _inspect_options(inspect)
    inspect.set_defaults(run=_inspect, small_file=small_file)
    plan = command("plan", "what a model will take of a graphics card and of RAM")
    _plan_options(plan)
    plan.set_defaults(run=_plan)
    convert = command("convert", "write a 4-bit file in another program's format")
    _convert_options(convert)
    convert.set_defaults(run=_convert)
    partials.add_command(commands)


def _quantize(options: argparse.Namespace) -> None:
    from .quantize import quantize

    quantize(options)


def _inspect(options: argparse.Namespace) -> None:
    from .inspect import inspect

    inspect(options)


def _plan(options: argparse.Namespace) -> None:
    from .plan import plan

    plan(options)


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert

    convert(options)


def quantize_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `quantize` takes."""
    parser.add_argument(
        "source",
        help=(
            "a diffusion model or a text encoder (T5, Qwen, Gemma, Llama, Mistral): a .safetensors"
            " or .gguf file (16 bit, fp8, int8, mxfp8, nvfp4, W4A8, W4A4, GGUF; an all-in-one"
            " checkpoint, too), one of several files or their .safetensors.index.json, or a folder"
            " that diffusers saved"
        ),
    )
    parser.add_argument(
        "target", help="quantized .safetensors file to write; an unfinished one is gone on with"
    )
    parser.add_argument(
        "--method",
        choices=("svdquant", "vq", "stock"),
        default="svdquant",
        help=(
            "svdquant: 4-bit weights and activations; vq: codebooks of 2 to 4 bits a weight; stock:"
            " a format that ComfyUI opens without Nibble (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--format",
        help=(
            "for --method svdquant: svdquant_w4a4 (default; runs with activations of 4 or 8 bits; a"
            " text encoder's stay in 16 bit, and its default is svdquant_w4a8 with rank 0),"
            " svdquant_w4a8 (16 free levels and more scales, for activations of 8 bits alone) or"
            " svdquant_nvfp4 (4-bit floats); for --method stock: asym_w4a8_int8 (default),"
            " int8_convrot or nvfp4, under the names that ComfyUI knows"
        ),
    )
    parser.add_argument(
        "--preset",
        choices=("fast", "vq4dit", "best"),
        default="fast",
        help=(
            "fast: data-free, from the weights and noise; best: calibrated by running the model"
            " (outside ComfyUI: FLUX.1 and DiT); vq4dit: the paper (vq only)"
        ),
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "to measure on: a .safetensors file of ComfyUI's node Save Calibration Prompts, or with"
            " text encoders' outputs 'tokens' (P, T, context) and 'pooled' (P, vector); without it"
            " they are random"
        ),
    )
    parser.add_argument(
        "--width",
        type=int,
        help=(
            "of the pictures to measure on, in pixels (default: the file of prompts', else 512; 256"
            " on noise)"
        ),
    )
    parser.add_argument("--height", type=int, help="the same (default: as --width)")
    parser.add_argument(
        "--steps",
        type=int,
        help="sampling steps of each picture (default: 8); --method vq: of calibration a block",
    )
    parser.add_argument(
        "--shift",
        type=float,
        metavar="S",
        help=(
            "of the time schedule, t = e^S / (e^S + 1/u - 1) (default: the model's, 1.15 for"
            " FLUX.1 dev and 0 for schnell)"
        ),
    )
    _svdquant_options(parser)
    _vq_options(parser)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--memory-cap",
        type=float,
        default=2.0,
        metavar="GB",
        help=(
            "for recorded statistics, or one block's inputs and outputs; --preset fast runs the"
            " model on noise only if it fits under this too (default: %(default)s)"
        ),
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, …")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a quantized file that was made with other options or of another model",
    )
    _parts_options(parser)
    parser.add_argument(
        "--driven",
        action="store_true",
        help=(
            "for a program that runs this one: progress and report as lines of JSON on stdout, and"
            " an end when standard input ends"
        ),
    )
    parser.set_defaults(quiet=False)


def _parts_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "by several workers (--preset fast)",
        "one command with --part for each range of layers, in any order and on any machine of one"
        " kind; then one with --parts, which gives the bytes of a single run",
    )
    group.add_argument(
        "--part",
        metavar="K/N",
        help="make only the K-th of N ranges of layers, in the file TARGET.partKofN",
    )
    group.add_argument(
        "--parts",
        type=int,
        metavar="N",
        help=(
            "join the N part files of the same source and options into TARGET, make what they lack,"
            " and remove them"
        ),
    )


def _svdquant_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank",
        type=int,
        help="of the 16-bit branch (default: 32); 0 for none, with svdquant_w4a8",
    )
    parser.add_argument("--solver", help="alternating or svd")
    parser.add_argument(
        "--activations",
        choices=("4", "8", "auto"),
        help=(
            "bits of the activations that layers are fitted for (default: 4); 8 for Hopper,"
            " Blackwell and CPUs, more accurate; auto: 8 in the layers that gain most"
        ),
    )
    parser.add_argument(
        "--share-8bit",
        type=float,
        metavar="S",
        help="of the multiplications, for --activations auto: 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--group", type=int, help="columns that share a scale of svdquant_w4a8: 16, 32 or 64"
    )
    parser.add_argument("--rotation", help="auto, on or off")
    parser.add_argument("--modulation", help="w4a16 or keep")
    parser.add_argument(
        "--compare",
        action="store_true",
        default=None,
        help=(
            "with --format svdquant_nvfp4: tell in the report what int4 would have given (twice the"
            " time)"
        ),
    )
    parser.add_argument("--gptq", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN",
        help="layers to keep in 16 bit, e.g. 'double_blocks.0.*'; repeatable",
    )
    parser.add_argument(
        "--w4a16",
        action="append",
        metavar="PATTERN",
        help="layers with 4-bit weights only; may be repeated",
    )


def _vq_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--method vq")
    group.add_argument("--bits", type=int, help="a weight: 2, 3 (default) or 4")
    group.add_argument(
        "--codewords",
        type=int,
        help="instead of --bits: a power of two of codewords, of --vector weights each",
    )
    group.add_argument("--vector", type=int)
    group.add_argument(
        "--budget",
        type=float,
        metavar="GB",
        help="size of the whole file: layers get 2, 3 or 4 bits by what each needs most",
    )
    group.add_argument(
        "--candidates",
        type=int,
        help="codewords that a group of weights may choose from, for --preset vq4dit (default: 2)",
    )


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help=(
            "any model file or folder, any other file that Nibble writes, or a folder of couplings;"
            " with --plan also the name of a known model, such as flux1-dev"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plan", action="store_true", help="what quantizing this file would give: layers and size"
    )
    parser.add_argument("--rank", type=int, default=32, help="for --plan (default: %(default)s)")
    parser.add_argument(
        "--method",
        choices=("svdquant", "vq"),
        default="svdquant",
        help="for --plan (default: %(default)s)",
    )
    parser.add_argument(
        "--bits", type=int, default=3, help="for --plan --method vq (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all of the file and compare it with its checksums",
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help=(
            "file of a diffusion model, quantized or not, or the name of a published one, such as"
            " flux1-dev, with whose text encoders and VAE the plan is then made"
        ),
    )
    parser.add_argument(
        "--encoder",
        action="append",
        metavar="FILE",
        help="text encoder: a file, or a name such as t5-xxl; may be repeated",
    )
    parser.add_argument("--vae", metavar="FILE", help="VAE: a file, or a name such as flux")
    parser.add_argument("--lora", action="append", metavar="FILE", help="LoRA; may be repeated")
    parser.add_argument(
        "--card", default="8 GB", help="memory of the graphics card, or cpu (default: %(default)s)"
    )
    parser.add_argument(
        "--ram", type=float, default=16.0, metavar="GB", help="of the computer (default: 16)"
    )
    parser.add_argument("--width", type=int, default=1024, help="in pixels (default: 1024)")
    parser.add_argument("--height", type=int, help="the same (default: as --width)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--frames", type=int, default=1, help="of a video (default: 1)")
    parser.add_argument(
        "--references",
        type=int,
        default=0,
        help="pictures that the model looks at, as FLUX Kontext does (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help=(
            "4-bit .safetensors file of Nibble, Nunchaku or comfy-kitchen, or a folder of"
            " Nunchaku's first version"
        ),
    )
    parser.add_argument("target", help=".safetensors file to write")
    parser.add_argument(
        "--to",
        choices=("nibble", "kitchen", "nunchaku"),
        default="nibble",
        help="its format (default: %(default)s)",
    )
