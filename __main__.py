"""The terminal's front door. One of

    python path/to/ComfyUI-Nibble COMMAND   from any folder, whatever the plugin's is called
    nibble COMMAND, python -m nibble COMMAND   after `pip install .`

Exit codes: 0 done, 1 refused (the reason is on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import ctypes
import importlib.util
import logging
import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _folder_as_package() -> int:
    """This folder, started as a script, runs as the package `nibble`; returns the exit code.

    Python puts such a folder first on the path, where `nodes` or `kernels` would hide packages of
    those names from everything else.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.util.spec_from_file_location(
        "nibble", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["nibble"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("nibble.__main__").main()


if not __package__:
    sys.exit(_folder_as_package())

from . import api  # noqa: E402
from .demo import cli as demo  # noqa: E402
from .farm import command as farm  # noqa: E402
from .quant.cli import examples, options  # noqa: E402

BENCHES = HERE / "tests" / "bench"


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


def program() -> str:
    """How this was started, for usage and examples to be typed the same way."""
    started = Path(sys.argv[0])
    if started.resolve() in (HERE, HERE / "__main__.py"):
        return f'python "{started}"' if " " in str(started) else f"python {started}"
    return "nibble" if started.stem == "nibble" else "python -m nibble"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Diffusion transformers at 4 bits.",
        epilog=examples(program()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nibble {api.version()}")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{demo,quantize,inspect,plan,convert,partials,farm,cubins,libraries,bench}",
    )
    demo.add_command(commands)
    options.add_commands(commands, examples(program()), api.small_file)
    farm.add_command(commands)
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
        print(f"usage: {program()} bench {usage}", file=sys.stderr)
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
