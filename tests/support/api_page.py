"""docs/api.md, made of the docstrings of what scripts import.

python tests/support/api_page.py        writes it
"""

import importlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkout import ROOT

PAGE = ROOT / "docs" / "api.md"
BEGINNING = """# In Python

<!-- made by tests/support/api_page.py from the docstrings -->

After `pip install ./ComfyUI-Nibble` (`"./ComfyUI-Nibble[scripts]"` brings torch and diffusers too;
LoRAs need peft). `import nibble` is light: torch is imported when something is first used.
"""


def typed(parameter: inspect.Parameter) -> str:
    """A parameter as its function's source has it."""
    stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    text = f"{stars}{parameter.name}: {parameter.annotation}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def signature(name: str, function: object) -> str:
    """A line for each parameter."""
    found = inspect.signature(function)
    lines, starred = [f"nibble.{name}("], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {typed(parameter)},")
    returned = found.return_annotation
    return "\n".join([*lines, f") -> {returned}" if isinstance(returned, str) else ")"])


def section(name: str, thing: object) -> str:
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    return f"\n## {name}\n\n```python\n{signature(name, thing)}\n```\n\n```text\n{text}\n```\n"


def page() -> str:
    """The text of docs/api.md."""
    api = importlib.import_module("nibble.api")
    config = importlib.import_module("nibble.quant.diffusers.quantizer").NibbleConfig
    names = ("quantize", "load", "inspect", "cache", "calibrate_cache")
    parts = [section(name, getattr(api, name)) for name in names]
    parts.append(section("NibbleConfig", config))
    return (
        BEGINNING
        + "".join(parts)
        + "\n## \\_\\_version\\_\\_\n\n`nibble.__version__`: that of pyproject.toml.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
