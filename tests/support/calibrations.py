"""A calibration of caching, whole and small."""

import numpy as np

from nibble.accel.caching.calibration_file import Calibration
from nibble.accel.caching.flow_time import FlowTime
from nibble.accel.caching.smoothcache import Curve

STEPS = 6


def calibration(**run) -> Calibration:
    velocities = np.random.default_rng(0).normal(size=(2, STEPS, 40)).round(3)
    rows = [[0.1 * k] * (STEPS - k) for k in (1, 2)]
    return Calibration(
        model={"class": "Flux", "fingerprint": "0f" * 16, "name": "Flux", "weights": "16 bit"},
        run={
            "sampler": "euler",
            "steps": STEPS,
            "sigmas": [1 - i / STEPS for i in range(STEPS + 1)],
            "flow": FlowTime().to_json(),
            "shift": 3.0,
            "cfg": 1.0,
            "latent": [1, 16, 8, 8],
            "prompts": 2,
            "seed": 5,
        }
        | run,
        teacache={
            "feature": "modulated",
            "coefficients": [2.0, -1.0, 0.0],
            "x_min": 0.1,
            "x_max": 0.5,
            "r2": 0.9,
            "points": [[0.1, 0.2], [0.5, 0.3]],
        },
        curves={"step": Curve(rows, rows, 4), "double": Curve(rows, rows, 4)},
        grams=np.einsum("pic,pjc->pij", velocities, velocities),
    )
