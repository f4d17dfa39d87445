"""The terminal's front door: python -m nibble COMMAND, as `--help` lists them.

Exit codes: 0 done, 1 refused (the reason is on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import ctypes
import logging
import os
import runpy
import sys
from pathlib import Path

from .demo import cli as demo
from .quant.cli import EXAMPLES, options

BENCHES = Path(__file__).resolve().parent / "tests" / "bench"


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Large tensors on Linux in pages of 2 MB, and their memory used again.

    Every operation on a layer's matrices had its result mapped anew and handed out in pages of
    4 KB: a third of the time that quantizing took. What is freed stays with the process until it
    ends.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch first allocates
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    keep_memory()
    try:
        if arguments[:1] == ["bench"]:  # a bench has arguments of its own
            return bench(arguments[1:])
        if arguments[:1] == ["cubins"]:  # imports torch, as all of `kernels` does
            from .kernels.backends.cubins import build

            return build.main(arguments[1:])
        if arguments[:1] == ["libraries"]:
            from .kernels.backends import cpu_library_build

            return cpu_library_build.main(arguments[1:])
        command = _parser().parse_args(arguments)
        command.run(command)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the finished layers", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` closed our output
        sys.stderr.close()
    except ModuleNotFoundError as error:
        print(f"nibble: {error.name} is not installed; pip install {error.name}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"nibble: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nibble",
        description="Diffusion transformers at 4 bits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{demo,quantize,inspect,plan,convert,partials,cubins,libraries,bench}",
    )
    demo.add_command(commands)
    options.add_commands(commands, small_file)
    commands.add_parser(
        "cubins",
        help=(
            "compile the GPU kernels for a package, by NVRTC; without it they are compiled on the"
            " GPU's own machine when they are first needed"
        ),
    )
    commands.add_parser(
        "libraries",
        help=(
            "compile the CPU's kernels into the package, for this machine or, with Zig, for every"
            " platform"
        ),
    )
    commands.add_parser(
        "bench",
        help=(
            "run a benchmark of tests/bench (needs a source checkout): bench NAME [options]; "
            "or say what this machine has and what each op runs through: bench --env"
        ),
    )
    return parser


def small_file(path: Path, verify: bool) -> dict | None:
    """What a file of Nibble's own is that holds no model (an adapter, couplings, a state, a
    calibration), for `inspect`; None for any other. It is read whole, couplings where `verify` asks
    for it. Raises FileRefused for a damaged one.
    """
    from .accel.caching import calibration_file as caching
    from .accel.caf import inspect as caf
    from .quant.files import small, source_files
    from .quant.intlora import file as intlora
    from .quant.training import state

    if path.name.endswith(source_files.INDEX):
        return None
    if path.is_dir() or path.suffix == ".json":
        return caf.couplings_facts(path, verify) or caching.facts(path)
    kind = small.format_of(path)
    if kind == "intlora":
        adapter = intlora.read(path)
        return {"file": path.name, "kind": "IntLoRA adapter", "layers": len(adapter.layers)}
    if kind == state.FORMAT:
        steps = len(state.State(path).losses)
        return {"file": path.name, "kind": "state of a training", "steps": steps}
    return caf.facts(path, kind)


def bench(arguments: list[str]) -> int:
    """Runs tests/bench/bench_NAME.py, or all of them, with the remaining arguments; --env says what
    this machine has.
    """
    if arguments[:1] == ["--env"]:
        from .kernels import environment

        environment.main(arguments[1:])
        return 0
    benches = {
        path.stem.removeprefix("bench_"): path for path in sorted(BENCHES.glob("bench_*.py"))
    }
    if not benches:
        raise ValueError(
            "the benchmarks are not part of the installed package; run this from a clone of the"
            " repository"
        )
    name, *rest = arguments or ["--help"]
    if name not in (*benches, "all"):
        usage = f"{{{','.join([*benches, 'all', '--env'])}}} [options]"
        print(f"usage: python -m nibble bench {usage}", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    saved = sys.argv
    try:
        for path in benches.values() if name == "all" else [benches[name]]:
            sys.argv = [str(path), *rest]
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = saved
    return 0


if __name__ == "__main__":
    sys.exit(main())
