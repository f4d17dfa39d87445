"""The terminal's front door: python -m nibble {demo,quantize,inspect,convert,bench}.

Exit codes: 0 done, 1 refused (the reason is on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import logging
import math
import runpy
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m nibble quantize flux1-dev.safetensors flux1-dev-svdq-int4.safetensors
  python -m nibble quantize model.safetensors model-int4.safetensors --preset best --rank 64
  python -m nibble quantize model.safetensors model-vq3.safetensors --method vq --bits 3 --preset best
  python -m nibble inspect flux1-dev-svdq-int4.safetensors
  python -m nibble inspect --plan flux1-dev
  python -m nibble inspect --plan flux1-dev --method vq --bits 2
  python -m nibble convert svdq-int4_r32-flux.1-dev.safetensors flux1-dev-nibble.safetensors --to nibble
  python -m nibble demo --out demo.png
  python -m nibble bench --env
"""
BENCHES = Path(__file__).resolve().parent / "tests" / "bench"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if arguments[:1] == ["bench"]:  # a bench has arguments of its own
        command, options = bench, argparse.Namespace(rest=arguments[1:])
    else:
        options = _parser().parse_args(arguments)
        command = {"demo": demo, "quantize": quantize, "inspect": inspect, "convert": convert}[
            options.command
        ]
    try:
        return command(options) or 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the finished layers", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` closed our output
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"nibble: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nibble",
        description="Diffusion transformers at 4 bits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{demo,quantize,inspect,convert,bench}"
    )
    _demo_options(
        commands.add_parser(
            "demo", help="quantize the demo model that is included, and draw with it"
        )
    )
    _quantize_options(
        commands.add_parser(
            "quantize",
            help="make the quantized file of a model",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _inspect_options(
        commands.add_parser(
            "inspect",
            help="show what a file holds, or what quantizing it would give",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _convert_options(
        commands.add_parser(
            "convert",
            help="write a 4-bit file in another program's format",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    commands.add_parser(
        "bench",
        help=(
            "run a benchmark of tests/bench (needs a source checkout): bench NAME [options]; "
            "or say what this machine has and what each op runs through: bench --env"
        ),
    )
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=Path("demo-svdq-int4.safetensors"),
        help="4-bit file to write (default: %(default)s)",
    )
    parser.add_argument("--preset", choices=("fast", "best"), default="best")


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="16-bit, fp8 or ComfyUI-quantized .safetensors file of a diffusion model"
    )
    parser.add_argument(
        "target", help="quantized .safetensors file to write; an older one of Nibble's is replaced"
    )
    parser.add_argument(
        "--method",
        choices=("svdquant", "vq"),
        default="svdquant",
        help=(
            "svdquant: 4-bit weights and activations; vq: codebooks of 2 to 4 bits a weight"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--preset",
        choices=("fast", "vq4dit", "best"),
        default="fast",
        help=(
            "fast: data-free, from the weights and noise; best: calibrated by running the model;"
            " vq4dit: the paper (vq only)"
        ),
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "for --preset best: a .safetensors file with text encoders' outputs for your "
            "prompts, 'tokens' (P, T, context) and 'pooled' (P, vector); without it they are random"
        ),
    )
    parser.add_argument("--rank", type=int, help="of the 16-bit branch (default: 32)")
    parser.add_argument("--solver", help="alternating or svd")
    parser.add_argument("--rotation", help="auto, on or off")
    parser.add_argument("--modulation", help="w4a16 or keep")
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
    group.add_argument("--steps", type=int, help="of calibration a block")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="a .safetensors file; with --plan also the name of a known model, such as flux1-dev",
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
        "--verify", action="store_true", help="compare every tensor with its checksum"
    )


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


def demo(options: argparse.Namespace) -> None:
    """Quantizes the included demo model and draws with 16 and with 4 bits."""
    try:
        from .demo import run
    except ImportError as error:
        raise ValueError(
            f"the demo needs diffusers and Pillow ({error}); pip install diffusers pillow"
        ) from None
    with _Bar() as bar:
        run.main(options.out, options.preset, options.target, bar)


def quantize(options: argparse.Namespace) -> None:
    """SOURCE → TARGET, with a progress bar and a summary."""
    recipe = _recipe(options)
    statistics, teacher, calibration = _calibration(options, recipe)
    with _Bar() as bar:
        if options.method == "vq":
            from .quant.vq4dit.quantize import quantize_checkpoint

            report = quantize_checkpoint(
                options.source,
                options.target,
                recipe,
                statistics,
                teacher,
                bar,
                bar.note,
                device=options.device,
                calibration=calibration,
            )
        else:
            from .quant.svdquant.quantize import quantize_checkpoint

            report = quantize_checkpoint(
                options.source,
                options.target,
                recipe,
                statistics,
                bar,
                device=options.device,
                calibration=calibration,
            )
    _print_summary(options.target, report.summary())


_SVDQUANT_OPTIONS = ("rank", "solver", "rotation", "gptq", "w4a16")
_VQ_OPTIONS = {
    "bits": "bits",
    "codewords": "codewords",
    "vector": "vector",
    "budget": "budget_gb",
    "candidates": "candidates",
    "steps": "steps",
}


def _recipe(options: argparse.Namespace):
    """The method's recipe. Raises ValueError for options of the other method."""
    vq = options.method == "vq"
    strange = [
        name
        for name in (_SVDQUANT_OPTIONS if vq else _VQ_OPTIONS)
        if getattr(options, name) is not None
    ]
    if strange:
        raise ValueError(
            f"--{strange[0]} belongs to --method {'svdquant' if vq else 'vq'}; leave it out, or"
            " choose that method"
        )
    if vq:
        from .quant.vq4dit.recipe import Recipe

        modulation = "vq" if options.modulation == "w4a16" else options.modulation
        changes = {field: getattr(options, name) for name, field in _VQ_OPTIONS.items()} | {
            "modulation": modulation
        }
    else:
        from .quant.svdquant.recipe import Recipe

        changes = {name: getattr(options, name) for name in (*_SVDQUANT_OPTIONS, "modulation")}
    return Recipe.from_preset(options.preset, keep=options.keep, seed=options.seed, **changes)


def _calibration(options: argparse.Namespace, recipe) -> tuple:
    """(recorded inputs by layer | None, the model at work | None, what they come from): checks
    source and target, and whether all is done, before the long recording.

    The fast preset records only what costs little: a FLUX.1 that fits under the memory cap in
    float32, on random conditioning.
    """
    from .quant.architectures import plan, recognise
    from .quant.checkpoint_run import calibrated_on
    from .quant.files.source import Source
    from .quant.files.writer import check_target

    source = Source(options.source)
    check_target(source.path, options.target)
    architecture = recognise(source.shapes, source.name)
    fast = options.preset == "fast"
    if fast and (
        architecture.name != "FLUX.1"
        or 4 * sum(map(math.prod, source.shapes.values())) > options.memory_cap * 1e9
    ):
        return None, None, {"kind": "weights only"}
    if architecture.name != "FLUX.1":
        raise ValueError(
            f"{source.name} is a {architecture.name}, and outside ComfyUI only FLUX.1 can be"
            " calibrated; use --preset fast, or the node"
            f" {'VQ' if options.method == 'vq' else 'SVDQuant'} Quantize Checkpoint in ComfyUI"
        )
    names = [
        layer.name
        for layer in plan(source.shapes, architecture, recipe, source.name)
        if layer.action != "keep"
    ]
    try:
        from .quant import diffusers
    except ImportError as error:
        if fast:
            return None, None, {"kind": "weights only"}
        raise ValueError(
            f"--preset {options.preset} needs diffusers to run the model ({error}); pip install"
            " diffusers, or use --preset fast"
        ) from None
    random = fast or options.prompts is None
    prompts, facts = (
        ((None, None), {"kind": "random conditioning"}) if random else _prompts(options.prompts)
    )
    if calibrated_on(options.target, source, recipe) == facts:
        return None, None, facts
    state, cap = (
        {name: source.read(name).float() for name in source.shapes},
        int(options.memory_cap * 1e9),
    )
    if options.method == "vq" and not fast:
        return None, diffusers.flux_teacher(state, *prompts, cap=cap, seed=recipe.seed), facts
    with _Bar("tokens") as bar:
        statistics = diffusers.record_inputs(
            state,
            names,
            *prompts,
            cap=cap,
            seed=recipe.seed,
            report=lambda done, total: bar(done, total, "recording inputs"),
        )
    return statistics.get, None, facts


def _prompts(path: Path) -> tuple[tuple, dict]:
    """((tokens, pooled), facts about them) of a file with text encoders' outputs."""
    from .quant.files.errors import FileRefused
    from .quant.files.safetensors import checksum, read_header, read_tensor

    header = read_header(path)
    if not {"tokens", "pooled"} <= header.tensors.keys():
        raise FileRefused(
            f"{path.name} lacks the tensors 'tokens' and 'pooled'; save the text encoders' outputs"
            " under these names."
        )
    tokens, pooled = read_tensor(header, "tokens").float(), read_tensor(header, "pooled").float()
    return (tokens, pooled), {
        "kind": "prompts",
        "prompts": len(tokens),
        "fingerprint": f"{checksum(tokens)}{checksum(pooled)}",
    }


def convert(options: argparse.Namespace) -> None:
    """SOURCE → TARGET with the same numbers, with a progress bar and a summary."""
    from .quant.interop.convert import convert as run

    with _Bar("layers") as bar:
        lines = run(options.source, options.target, options.to, bar)
    _print_summary(options.target, lines)


def inspect(options: argparse.Namespace) -> None:
    """Prints what a file is, or what would become of it."""
    from .quant.files.checkpoint import is_quantized, open_quantized
    from .quant.files.errors import FileRefused
    from .quant.interop.convert import facts_of
    from .quant.interop.opening import is_4bit

    if options.plan:
        name, report = _plan(options)
        size = {"rank": options.rank} if options.method == "svdquant" else {"bits": options.bits}
        facts = {"model": name, **size, "report": json.loads(report.to_json(seconds=False))}
    elif is_quantized(options.file):
        quantized = open_quantized(options.file)
        if options.verify:
            with _Bar("tensors") as bar:
                quantized.verify(bar)
        name, facts = (
            quantized.path.name,
            {key: quantized.fact(key) for key in ("source", "recipe", "calibration", "report")},
        )
        facts = {
            "file": name,
            "format": quantized.metadata["nibble_version"],
            "method": quantized.metadata["method"],
            "layers": quantized.layers,
            **facts,
        }
    else:
        if options.verify:
            raise FileRefused(
                f"{Path(options.file).name} was not made by Nibble, so it has no checksums; leave"
                " out --verify."
            )
        if Path(options.file).is_dir() or is_4bit(options.file):
            facts = facts_of(options.file)
            (
                print(json.dumps(facts, indent=1))
                if options.json
                else _print_facts(facts["file"], facts, False)
            )
            return
        options.plan, options.method, options.rank = True, "svdquant", 32
        name, report = _plan(options)
        facts = {
            "file": name,
            "quantized": False,
            "architecture": report.architecture,
            "bytes": report.bytes_before,
            "layers": len(report.rows),
            "hint": "add --plan to see what quantizing it would give",
        }
    (
        print(json.dumps(facts, indent=1))
        if options.json
        else _print_facts(name, facts, options.verify)
    )


def _plan(options: argparse.Namespace) -> tuple[str, object]:
    from .quant.architectures import KNOWN_MODELS, known_shapes
    from .quant.files.errors import FileRefused
    from .quant.files.source import Source

    if options.method == "vq":
        from .quant.vq4dit.quantize import predict
        from .quant.vq4dit.recipe import Recipe

        recipe = Recipe.from_preset("best", bits=options.bits)
    else:
        from .quant.svdquant.quantize import predict
        from .quant.svdquant.recipe import Recipe

        recipe = Recipe.from_preset("fast", rank=options.rank)
    path = Path(options.file)
    if path.exists() or path.suffix:
        source = Source(path)
        return source.name, predict(
            source.shapes, recipe, source.name, source.bytes, source.kept_dtype
        )
    shapes = known_shapes(options.file)
    if shapes is None:
        raise FileRefused(
            f"{options.file} is no file and no known model; choose a file or one of"
            f" {', '.join(KNOWN_MODELS)}."
        )
    return options.file, predict(shapes, recipe, options.file)


def _print_facts(name: str, facts: dict, verified: bool) -> None:
    from .quant.report import Report

    if "report" in facts:
        report = Report.from_json(json.dumps(facts["report"]))
        lines = [
            (key, json.dumps(facts[key]))
            for key in ("format", "method", "source", "recipe", "calibration")
            if key in facts
        ]
        _print_rows(report.rows)
        _print_summary(
            name, lines + report.summary() + [("checksums", "all tensors match")] * verified
        )
        if facts.get("model"):
            how = f"rank {facts['rank']}" if "rank" in facts else f"{facts['bits']} bits"
            print(
                f"  predicted file  {report.bytes_after:,} bytes = {report.bytes_after / 1e9:.3f}"
                f" GB at {how}"
            )
    else:
        _print_summary(name, [(key, str(value)) for key, value in facts.items() if key != "file"])


def _print_rows(rows: list) -> None:
    print(f"{'layer':<46}{'action':<8}{'dB':>7}{'MB before':>11}{'after':>9}  why")
    for row in rows:
        db = "" if row.db is None else f"{row.db:.1f}"
        print(
            f"{row.name:<46}{row.action:<8}{db:>7}{row.bytes_before / 1e6:>11.2f}{row.bytes_after / 1e6:>9.2f}"
            f"  {row.why}"
        )


def _print_summary(title: object, lines: list[tuple[str, str]]) -> None:
    print(title)
    for label, value in lines:
        print(f"  {label:<13} {value}")


class _Bar:
    """A tqdm bar as a progress callback (done, total, what)."""

    def __init__(self, unit: str = "weights"):
        self.unit = unit

    def __enter__(self) -> "_Bar":
        from tqdm import tqdm

        self.bar = tqdm(unit=f" {self.unit}", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.bar.total = total
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)

    def note(self, error) -> None:
        """A block's progress in calibration, behind the bar."""
        self.bar.set_postfix_str(f"step {error.step}/{error.steps}, {error.db:.1f} dB")


def bench(options: argparse.Namespace) -> int | None:
    """Runs tests/bench/bench_NAME.py, or all of them, with the remaining arguments; --env says what
    this machine has.
    """
    if options.rest[:1] == ["--env"]:
        return _environment(options.rest[1:])
    found = {path.stem.removeprefix("bench_"): path for path in sorted(BENCHES.glob("bench_*.py"))}
    if not found:
        raise ValueError(
            "the benchmarks are not part of the installed package; run this from a clone of the"
            " repository"
        )
    name, *rest = options.rest or ["--help"]
    if name not in (*found, "all"):
        print(
            f"usage: python -m nibble bench {{{','.join([*found, 'all', '--env'])}}} [options]",
            file=sys.stderr,
        )
        return 0 if name in ("-h", "--help") else 2
    saved = sys.argv
    try:
        for path in found.values() if name == "all" else [found[name]]:
            sys.argv = [str(path), *rest]
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = saved
    return None


def _environment(rest: list[str]) -> None:
    """bench --env [--json FILE] [--shape M N K]: hardware, versions, and what each op runs
    through.
    """
    from .kernels import environment

    parser = argparse.ArgumentParser(
        prog="python -m nibble bench --env",
        description="What this machine has, and what each op runs through and why.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("M", "N", "K"),
        default=environment.ops.TYPICAL,
        help="tokens, outputs and inputs of the layer to speak of (default: %(default)s)",
    )
    options = parser.parse_args(rest)
    found = environment.describe(tuple(options.shape))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(environment.table(found))


if __name__ == "__main__":
    sys.exit(main())
