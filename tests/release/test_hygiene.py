"""What the registry's scanners flag in the archive that is published: every hit has its reason
here, and a new one fails. A version that is flagged is never offered, whatever it does.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import archive
import pytest

CODE = (".py", ".js", ".mjs")
TEXT = (*CODE, ".json", ".md", ".toml", ".txt", ".yaml", ".css", ".html")
# what → how it looks in code
PATTERNS = {
    "a process": r"\bsubprocess\b|\bos\.(system|popen|exec\w*|spawn\w*)\b|\bPopen\b|shell=True",
    "code from text": r"(?<![\w.])(eval|exec|compile|__import__)\(|\bnew Function\b|\bmarshal\b"
    r"|\brunpy\b",
    "a native library": r"\bctypes\.(CDLL|WinDLL|OleDLL|PyDLL|windll)\b",
    "the network": r"\b(import|from) (requests|urllib|http|socket|aiohttp|websockets?|httpx|ftplib"
    r"|smtplib|paramiko)\b|\burlopen\b|\bXMLHttpRequest\b|\bWebSocket\b|\bsendBeacon\b"
    r"|(?<![\w.])fetch\(|\bhf_hub_download\b|\bsnapshot_download\b",
    "a hidden text": r"\bbase64\b|\batob\(|\bcryptography\b|\bFernet\b|\bzlib\.decompress\b",
    "a pickle": r"(?m)^\s*(import|from) (pickle|dill|joblib)\b|\bpickle\.loads?\b|\btorch\.load\b"
    r"|weights_only=False",
    "page's HTML": r"\.innerHTML\s*=|\bdocument\.write\b|\binsertAdjacentHTML\b",
    "secrets": r"\bos\.environ\.(copy|items)\(|(?i:api_key|access_token|\.ssh\b|keyring)",
}
LONG = re.compile(r"[A-Za-z0-9+/]{400,}={0,2}")  # encoded bytes in a text
# (what, file) → why it is there
ALLOWED = {
    ("a process", "kernels/environment.py"): "nvidia-smi's driver version, for `bench --env` alone",
    (
        "a process",
        "kernels/backends/cpu_library_build.py",
    ): "the compiler, for the command `libraries` alone",
    ("a process", "farm/in_order.py"): "the type alone: farm/work.py starts it",
    ("a process", "farm/on_ray.py"): "farm/ray_driver.py, for the command `farm` alone",
    ("a process", "farm/work.py"): "the command `quantize` of this pack, for `farm` alone",
    (
        "a process",
        "nodes/bridge/quantize/farm_process.py",
    ): "the command `farm` of this pack, for the node Quantize on a Farm alone",
    ("code from text", "__main__.py"): "runpy: benchmarks of a clone, for the command `bench`",
    ("code from text", "farm/ray_driver.py"): "runpy: farm/work.py, on the machine of a cluster",
    ("a native library", "__main__.py"): "glibc's mallopt: memory is used again",
    ("a native library", "kernels/backends/cpu_library.py"): "the CPU's kernels",
    ("a native library", "kernels/backends/cubins/driver.py"): "the graphics driver",
    ("a native library", "kernels/backends/cubins/nvrtc.py"): "torch's own compiler of kernels",
    ("the network", "farm/ray_driver.py"): "whether the cluster that the user names answers",
    ("the network", "farm/work.py"): "the name of this machine: gethostname",
    (
        "the network",
        "nodes/bridge/host/unfinished.py",
    ): "aiohttp, in which ComfyUI's own server writes its routes",
    ("a hidden text", "nodes/bridge/feather/report.py"): "a picture in the page: data:image/jpeg",
}
# files that are no text → why
BINARIES = {
    "*.png": "pictures of the documents",
    "*.webp": "pictures of the documents",
    "*.jpg": "pictures of the templates",
    "demo/weights/*.safetensors": "the demo model",
    "kernels/cubins/*": "the GPU's kernels, made by publish.yml",
    "kernels/libraries/*": "the CPU's kernels, made by publish.yml",
}
MAGIC = {
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "a program": (b"MZ", b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"),
    "an archive": (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf"),
}
FILES = archive.files(tuple(archive.included()))


def hits(name: str, text: str) -> set[tuple[str, str]]:
    return {(what, name) for what, pattern in PATTERNS.items() if re.search(pattern, text)}


def texts(endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in FILES:
        if name.endswith(endings):
            yield name, (archive.ROOT / name).read_text(encoding="utf-8")


def test_every_hit_has_a_reason_and_every_reason_a_hit():
    found = set().union(*(hits(name, text) for name, text in texts(CODE)))
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set()


@pytest.mark.parametrize(
    "what, line",
    [
        ("a process", "import subprocess"),
        ("a process", "os.system('x')"),
        ("code from text", "value = eval(text)"),
        ("a native library", "ctypes.CDLL(path)"),
        ("the network", "from urllib.request import urlopen"),
        ("the network", "const page = await fetch(address);"),
        ("a hidden text", "base64.b64decode(text)"),
        ("a pickle", "    import pickle"),
        ("a pickle", "torch.load(path)"),
        ("page's HTML", "element.innerHTML = text;"),
        ("secrets", 'os.environ["API_KEY"]'),
    ],
)
def test_a_new_hit_is_found(what, line):
    assert hits("x.py", line) == {(what, "x.py")}


def test_what_is_harmless_is_no_hit():
    harmless = "model.eval()\nre.compile(text)\nasync def prefetch(x): ...\nPART.exec(value)"
    assert hits("x.py", harmless) == set()


def test_only_files_with_a_reason_are_no_text():
    strangers = []
    for name in FILES:
        data = (archive.ROOT / name).read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            if not any(fnmatchcase(name, pattern) for pattern in BINARIES):
                strangers.append(name)
    assert not strangers


def test_no_file_is_a_pickle_a_program_or_an_archive():
    for name in FILES:
        beginning = (archive.ROOT / name).read_bytes()[:4]
        found = [what for what, magic in MAGIC.items() if beginning.startswith(magic)]
        assert not found, f"{name} is {found[0]}"


def test_no_text_holds_encoded_bytes():
    found = [name for name, text in texts(TEXT) if LONG.search(text)]
    assert not found


def test_no_file_of_the_project_alone_is_published():
    """Tests hold damaged files and words that scanners look for."""
    assert not [name for name in FILES if name.startswith(("tests/", ".github/", ".ci/"))]


def test_templates_hold_no_address_but_of_models():
    for name, text in texts((".json",)):
        if name.startswith("example_workflows/"):
            hosts = set(re.findall(r"https?://([^/\"\\ ]+)", json.dumps(json.loads(text))))
            assert hosts <= {"huggingface.co", "github.com", "arxiv.org"}, name
