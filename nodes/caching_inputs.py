"""The inputs that caching's nodes share."""

from comfy_api.latest import io

from .bridge.caching.settings import (
    AUTO,
    CUSTOM,
    LEVELS,
    NONE,
    ORDERS,
    PRESETS,
    STORES,
    calibration_names,
)


def teacache_widgets() -> list:
    """What everyone sees."""
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default="balanced",
            tooltip=(
                "Steps computed on the demo model: quality about two thirds, balanced about half,"
                " fast about a third. custom: by the threshold below."
            ),
        ),
        io.Float.Input(
            "threshold",
            default=0.03,
            min=0.0,
            max=3.0,
            step=0.005,
            round=0.0001,
            tooltip=(
                "With preset custom: how much error (with the rule teacache: change) may pile up"
                " before the model is computed again. 0: every step is computed, bit for bit."
            ),
        ),
        *window_widgets(),
        calibration_widget(AUTO, NONE),
    ]


def window_widgets() -> list:
    return [
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps before this share of the run are always computed.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps behind this share of the run are always computed.",
        ),
    ]


def calibration_widget(*words: str):
    also = " none: the published coefficients of this architecture." if NONE in words else ""
    return io.Combo.Input(
        "calibration",
        options=calibration_names(*words),
        default=words[0],
        tooltip=(
            f"What Calibrate Cache measured. auto: the newest one of this model.{also} Or connect"
            " Calibrate Cache's output."
        ),
    )


def teacache_expert_widgets() -> list:
    return [
        io.Combo.Input(
            "rule",
            options=[AUTO, "teacache", "error"],
            default=AUTO,
            advanced=True,
            tooltip=(
                "When to compute again. error: by how wrong the guess for the last computed step"
                " was. teacache: by the change of the first block's input, thresholds as published."
                " auto: the preset's."
            ),
        ),
        io.Combo.Input(
            "level",
            options=list(LEVELS),
            default=AUTO,
            advanced=True,
            tooltip=(
                "blocks: the first block decides, the rest is reused. step: decided before the"
                " model runs, for whole-model torch.compile. auto: as deep as the model allows."
            ),
        ),
        *expert_widgets(),
    ]


def expert_widgets() -> list:
    """Collapsed, in every node that reuses."""
    return [
        io.Combo.Input(
            "extrapolation",
            options=list(ORDERS),
            default=AUTO,
            advanced=True,
            tooltip=(
                "A skipped step's result: reuse the last computed one, or follow the line or the"
                " parabola through the last ones. auto: what was measured to be closest."
            ),
        ),
        io.Int.Input(
            "first_steps",
            default=1,
            min=0,
            max=100,
            advanced=True,
            tooltip="This many steps at the beginning are always computed.",
        ),
        io.Int.Input(
            "last_steps",
            default=1,
            min=0,
            max=100,
            advanced=True,
            tooltip="This many steps at the end are always computed.",
        ),
        io.Combo.Input(
            "store",
            options=list(STORES),
            default="gpu",
            advanced=True,
            tooltip=(
                "Where reused results are kept. gpu: about 25 MB for each prompt of a 1-megapixel"
                " FLUX. cpu: no VRAM, slower steps."
            ),
        ),
    ]
