"""The inputs that caching's nodes share."""

from comfy_api.latest import io

from .bridge.caching.settings import (
    AUTO,
    CUSTOM,
    LEVELS,
    NONE,
    ORDERS,
    PRESETS,
    PUBLISHED,
    STORES,
    calibration_names,
)


def teacache_widgets() -> list:
    """The inputs that everyone sees."""
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default="balanced",
            tooltip=(
                "Share of the steps computed on the demo model, by the rule error: quality about"
                " two thirds, balanced about half, fast about a third. custom: set by the"
                " threshold below."
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
                "With preset custom: how much error (with rule teacache: change) may"
                " build up before the model is computed again. 0: every step is computed,"
                " bit for bit."
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
            tooltip="Steps after this share of the run are always computed.",
        ),
    ]


def calibration_widget(*words: str):
    also = " none: the published coefficients for this architecture." if NONE in words else ""
    return io.Combo.Input(
        "calibration",
        options=calibration_names(*words),
        default=words[0],
        tooltip=(
            f"A file from Calibrate Cache. auto: the newest one for this model.{also} Or connect"
            " the output of Calibrate Cache."
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
                "When to compute again. error: judged by how wrong the guess for the last"
                " computed step was. teacache: judged by the change of the first block's"
                " input, with coefficients and thresholds as published. auto: error, which every"
                " preset is made for."
            ),
        ),
        io.Combo.Input(
            "level",
            options=list(LEVELS),
            default=AUTO,
            advanced=True,
            tooltip=(
                "blocks: the first block decides, the rest is reused. step: decided"
                " before the model runs, for torch.compile of the whole model. auto: as"
                " deep as the model allows."
            ),
        ),
        *expert_widgets(),
    ]


def coefficients_widget():
    """Last among TeaCache's inputs."""
    return io.Combo.Input(
        "coefficients",
        options=list(PUBLISHED),
        default=AUTO,
        optional=True,
        advanced=True,
        tooltip=(
            "With rule teacache on Wan 2.1, which was fitted twice. auto: the first five steps are"
            " always computed. plain: only the first and the last one."
        ),
    )


def expert_widgets() -> list:
    """The collapsed inputs of every node that reuses results."""
    return [
        io.Combo.Input(
            "extrapolation",
            options=list(ORDERS),
            default=AUTO,
            advanced=True,
            tooltip=(
                "What a skipped step uses: the last computed result (reuse), or a point"
                " on the line or parabola through the last ones. auto: the line; weights fitted on"
                " the calibration where whole steps follow one of this schedule; with rule teacache"
                " reuse, as published."
            ),
        ),
        io.Int.Input(
            "first_steps",
            default=1,
            min=0,
            max=100,
            advanced=True,
            tooltip="This many steps at the start are always computed.",
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
                "Where results are kept for reuse. gpu: about 25 MB for each prompt of a"
                " 1-megapixel FLUX. cpu: no VRAM, slower steps."
            ),
        ),
    ]
