"""Patterns of layer names, as users type them into a widget of several lines."""


def patterns(text: str) -> tuple[str, ...]:
    """One pattern a line, such as double_blocks.0.*; empty lines are none."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
