"""What the recipes of all methods share: made from a preset, and written into the file that they
make.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, TypeVar

R = TypeVar("R", bound="FromPreset")


@dataclass(frozen=True)
class FromPreset:
    """Base of the methods' recipes, which are frozen dataclasses too. PRESETS: name → values that
    differ from the fields' defaults.
    """

    PRESETS: ClassVar[dict[str, dict]]

    preset: str = "fast"

    @classmethod
    def from_preset(cls: type[R], name: str = "fast", **changes) -> R:
        """A preset with changes; None means unchanged. Raises ValueError for unknown names and
        values, naming the choices.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"preset={name!r} is not one of {', '.join(cls.PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := changes.keys() - known:
            raise ValueError(
                f"a recipe has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
            )
        return cls(
            preset=name,
            **(
                cls.PRESETS[name]
                | {key: value for key, value in changes.items() if value is not None}
            ),
        )

    @property
    def ties(self) -> str:
        """What ties layers to one another, in words for a refusal; "": nothing does, so that any
        layers can be made apart from the others.
        """
        if self.preset == "fast":
            return ""
        return f"the preset {self.preset!r} runs the whole model"

    def to_json(self) -> str:
        """Every value, as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """The inverse of `to_json`. Raises ValueError for text that is no recipe."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a recipe is a JSON object, not {text[:40]!r}")
        return cls.from_preset(values.pop("preset", "fast"), **values)
