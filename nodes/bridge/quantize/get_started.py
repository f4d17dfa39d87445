"""Where to begin on this computer: a model that fits, what is missing for it, and the template that
has everything connected.

A template says by itself which files it needs (`properties.models` of its nodes) and which 4-bit
file it makes; the memory plan says what fits (`quant/files/memory/`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ....quant.files.memory.stages import Work
from ....quant.files.memory.switches import Plan
from ..host import charts, folders
from ..quantized import loading
from . import sources, vram_plan

TEMPLATES = Path(__file__).parents[3] / "example_workflows"
DEMO = "02 Demo model, 16 and 4 bits"
# goal → (published model of this size, its template), the one to be preferred first
PICKS = {
    "pictures": (
        ("flux1-dev", "01 FLUX.1 dev, text to image"),
        ("z-image", "03 Z-Image Turbo, text to image"),
    ),
    "pictures with text": (
        ("qwen-image", "04 Qwen-Image, text to image"),
        ("z-image", "03 Z-Image Turbo, text to image"),
    ),
    "edit a picture": (("flux1-dev", "05 FLUX.1 Kontext, edit"),),
    "fill in a picture": (("flux1-fill-dev", "06 FLUX.1 Fill, inpaint"),),
    "video": ((None, "07 Wan 2.2, text to video"),),  # the plan knows it by its file alone
}
FOUR_BIT = "4-bit model"  # the switch of the plan that the template turns by itself
_EDGE = 1024  # pixels; of the pictures that the plan is made for
_FITS = "fits"  # how the verdict of such a plan begins


@dataclass(frozen=True)
class Template:
    """A template's files. made: the 4-bit file that it makes and loads; source: what that is made
    of; needed: its other files. Each of the two last is (name, kind of folder, address).
    """

    name: str
    made: str
    source: tuple[str, str, str]
    needed: tuple[tuple[str, str, str], ...]

    @classmethod
    def read(cls, name: str) -> Template:
        """One of this pack."""
        nodes = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
        files = {node["type"]: _files(node) for node in nodes}
        (source,) = files.pop("NibbleQuantizeSVDQuant")
        loaders = [node for node in nodes if node["type"] == "NibbleLoadSVDQuant"]
        return cls(
            name,
            loaders[0]["widgets_values"][0],
            source,
            tuple(one for found in files.values() for one in found),
        )

    def missing(self) -> list[tuple[str, str, str]]:
        """The files that are not in ComfyUI's folders yet."""
        wanted = [*self.needed]
        if folders.find(self.made, folders.DIFFUSION_MODELS) is None:
            wanted.insert(0, self.source)
        return [one for one in wanted if folders.find(one[0], one[1]) is None]


def _files(node: dict) -> tuple[tuple[str, str, str], ...]:
    listed = node["properties"].get("models", [])
    return tuple((one["name"], one["directory"], one["url"]) for one in listed)


def advise(goal: str, card: str) -> tuple[str, str, dict]:
    """(what to do, the template to open, the chart `facts`). goal: of PICKS; card: of
    `vram_plan.CARDS`.
    """
    work = Work(size=(_EDGE, _EDGE), card=vram_plan.card_of(card), ram=vram_plan.ram_of(0))
    plans = [(name, _plan(model, work)) for model, name in PICKS[goal]]
    name, plan = next((pick for pick in plans if _fits(pick[1])), plans[-1])
    template = Template.read(name)
    steps = _steps(template, plan)
    summary = [
        ["card", _card(work)],
        ["RAM", charts.size(work.ram)],
        ["4-bit models here", _listed(loading.quantized_files())],
        ["models to quantize here", _listed(sources.listed())],
        ["our pick", f"{name}: {_verdict(plan)}"],
        *([f"step {number}", step] for number, step in enumerate(steps, 1)),
        ["to try first", f"the template {DEMO}: nothing to download, seconds on any CPU"],
    ]
    chart = {"kind": "facts", "title": f"Get started: {goal}", "summary": summary}
    return "\n".join(steps), name, chart


def _plan(model: str | None, work: Work) -> Plan | None:
    if model is None:
        return None
    published = (vram_plan.AS_PUBLISHED,)
    loadout = vram_plan.loadout(model, published, vram_plan.AS_PUBLISHED, ())
    return vram_plan.plan(loadout, work)


def _fits(plan: Plan | None) -> bool:
    return plan is not None and plan.verdict.startswith(_FITS)


def _verdict(plan: Plan | None) -> str:
    if plan is None:
        return "length and size of the video decide what it takes; VRAM Plan tells from its file"
    return f"{plan.verdict}, at {_EDGE} × {_EDGE}"


def _steps(template: Template, plan: Plan | None) -> list[str]:
    """What to do, in order."""
    steps = [f"Open the template {template.name}: this node's button, or Templates."]
    missing = template.missing()
    if missing:
        told = ", ".join(f"{name} into models/{kind}" for name, kind, _ in missing)
        steps.append(f"Download what ComfyUI then offers: {told}.")
    switches = [] if plan is None else plan.switches
    if folders.find(template.made, folders.DIFFUSION_MODELS) is not None:
        steps.append(f"Press Run: {template.made} is here.")
    else:
        costs = [f" ({one.costs})" for one in switches if one.name == FOUR_BIT]
        steps.append(f"Press Run. The first run makes {template.made}{''.join(costs)}.")
    more = [one for one in switches if one.on and one.name != FOUR_BIT]
    return steps + [f"To save memory, {one.name}: {one.how}." for one in more]


def _card(work: Work) -> str:
    if work.card is None:
        return "none: everything runs on the CPU, in RAM"
    return f"{charts.size(work.card)}, of which ComfyUI can have {charts.size(work.room)}"


def _listed(names: list[str]) -> str:
    """Some names, and how many there are."""
    if not names:
        return "none yet"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
