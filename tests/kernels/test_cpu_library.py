"""The package's CPU library: which one is loaded, why none is, the flags it is built with, and that
it runs where nothing can compile.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.kernels.backends import cpu_library, cpu_library_build, native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(built_library, tmp_path):
    """A copy of the package's folder that can be changed, for this machine alone."""
    built = Path(built_library.__file__)
    shutil.copy(built, tmp_path)
    shutil.copy(built.parent / "manifest.json", tmp_path)
    return tmp_path


def changed(package: Path, **values) -> Path:
    path = package / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return package


def why_not(folder: Path, abi: int = native.ABI) -> str:
    with pytest.raises(cpu_library.Unavailable) as reason:
        cpu_library.load(abi, folder)
    return str(reason.value)


# ---- which one is loaded -------------------------------------------------------------------------


def test_a_whole_library_of_these_sources_is_loaded(package):
    found = cpu_library.load(native.ABI, package)
    assert native.ABI == found.ABI and found.DEVICES == ("cpu",)
    assert found.__version__ == cpu_library_build.version()


def test_what_is_missing_or_does_not_fit_is_said(package, tmp_path, monkeypatch):
    assert why_not(tmp_path / "nowhere") == "the package carries no CPU library"
    assert "of other sources" in why_not(package, native.ABI + 1)
    monkeypatch.setenv("NIBBLE_LIBRARY", "0")
    assert "NIBBLE_LIBRARY=0" in why_not(package)
    monkeypatch.delenv("NIBBLE_LIBRARY")
    assert "of other sources" in why_not(changed(package, sources="0"))
    assert why_not(changed(package, platforms={})).endswith(f"for {cpu_library.here()}")


def test_a_damaged_file_is_not_loaded(package):
    library = next(path for path in package.iterdir() if path.stem.startswith("nibble_cpu"))
    library.write_bytes(library.read_bytes()[:-1])
    assert "is damaged" in why_not(package)


def test_a_file_that_does_not_load_is_said(package):
    """One of another system, whole: what a musl Linux would see."""
    (package / "other").write_bytes(b"none")
    sha256 = "140bedbf9c3f6d56a9846d2ba7088798683f4da0c248231336e6a05679e4fdfe"
    listed = {cpu_library.here(): {"file": "other", "sha256": sha256}}
    assert why_not(changed(package, platforms=listed)).startswith("other cannot be loaded: ")


@pytest.mark.parametrize(
    ("system", "processor", "name"),
    [
        ("Linux", "x86_64", "linux-x86_64"),
        ("Linux", "aarch64", "linux-aarch64"),
        ("Windows", "AMD64", "windows-x86_64"),
        ("Darwin", "arm64", "macos-aarch64"),
        ("Darwin", "x86_64", "macos-x86_64"),  # none is built
    ],
)
def test_a_machine_s_platform_has_the_manifest_s_name(system, processor, name, monkeypatch):
    monkeypatch.setattr(cpu_library.platform, "system", lambda: system)
    monkeypatch.setattr(cpu_library.platform, "machine", lambda: processor)
    assert cpu_library.here() == name
    assert (name in cpu_library_build.PLATFORMS) == (name != "macos-x86_64")


# ---- how it is built -----------------------------------------------------------------------------


def test_a_source_has_the_flags_of_its_instruction_set():
    """As cmake/cpu.cmake gives them to the extension."""
    flags = {
        path.stem: cpu_library_build.flags_of(path, True)
        for path in (cpu_library.CSRC / "cpu").glob("*.cpp")
    }
    assert all("-ffp-contract=off" in given for given in flags.values())
    assert "-mavx2" in flags["ops_avx2"] and "-mavx512f" not in flags["ops_avx2"]
    assert "-mavx512vnni" in flags["ops_avx512"]
    for name in set(flags) - {"ops_avx2", "ops_avx512"}:
        assert not [flag for flag in flags[name] if flag.startswith("-m")] or "avx" in name
    arm = cpu_library_build.flags_of(cpu_library.CSRC / "cpu" / "ops_avx2.cpp", False)
    assert "-mavx2" not in arm


def test_a_platform_that_cannot_be_made_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library_build, "zig", lambda: [])
    other = next(name for name in cpu_library_build.PLATFORMS if name != cpu_library.here())
    with pytest.raises(ValueError, match="pip install ziglang"):
        cpu_library_build.compile_library(other, tmp_path / "library")
    monkeypatch.setattr(cpu_library_build.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler was found"):
        cpu_library_build.compiler_here()


# ---- without a compiler --------------------------------------------------------------------------


def test_layers_run_through_it_where_nothing_can_compile(package, tmp_path):
    """A process of its own with an empty PATH; tests/release/check.py does the same to the whole
    archive in a new environment.
    """
    release = ROOT / "tests" / "release"
    program = (
        "import sys; from pathlib import Path\n"
        "sys.modules['nibble_kernels'] = None\n"
        f"sys.path[:0] = [{str(release)!r}, {str(ROOT / 'tests' / 'support')!r}]\n"
        "import checkout, in_package\n"
        "from nibble.kernels.backends import cpu_library\n"
        f"cpu_library.load.__defaults__ = (Path({str(package)!r}),)\n"
        "in_package.no_compiler(); in_package.layers('nibble')\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"PATH": str(empty), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "layers agree with plain torch" in done.stdout
