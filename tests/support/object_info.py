"""What a server says of its nodes (/object_info), read as the front end reads it."""

import math

WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def inputs_of(node: dict) -> dict[str, list]:
    """Input → its specification, in the order in which the front end shows them."""
    parts = ("required", "optional")
    return {
        name: node["input"][part][name]
        for part in parts
        for name in node["input_order"].get(part, [])
    }


def kind_of(spec: list) -> tuple[str, dict]:
    """(the input's type, its options); both ways to write a choice are a COMBO."""
    options = spec[1] if len(spec) > 1 else {}
    if isinstance(spec[0], list):
        return "COMBO", {**options, "options": spec[0]}
    return spec[0], options


def widgets_of(node: dict) -> list[str]:
    """The inputs that are widgets, in order."""
    found = []
    for name, spec in inputs_of(node).items():
        kind, options = kind_of(spec)
        if kind in WIDGETS and not options.get("forceInput"):
            found.append(name)
    return found


def is_link(value) -> bool:
    return isinstance(value, list)


def names_a_file(value: str) -> bool:
    """Lists of files differ from machine to machine; names of files have an ending."""
    return "." in value


def check_value(value, spec: list) -> None:
    """A widget's value has the type of its input, lies within its bounds, and is one of the
    choices that the pack itself offers; so no value slipped into a neighbour's place.
    """
    if is_link(value):
        return
    kind, options = kind_of(spec)
    if kind not in WIDGETS:  # of ComfyUI's own: a comparison, a choice with inputs of its own
        return
    assert isinstance(value, WIDGETS[kind]), f"{value!r} is no {kind}"
    if kind in ("INT", "FLOAT"):
        assert options.get("min", -math.inf) <= value <= options.get("max", math.inf)
    choices = options.get("options", [])
    static = choices and not any(
        names_a_file(str(choice)) or "(" in str(choice) for choice in choices
    )
    if static and not names_a_file(value):
        assert value in choices
