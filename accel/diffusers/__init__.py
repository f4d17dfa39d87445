"""Caching in scripts: the rules and files of accel/caching around a pipeline of diffusers, by
diffusers' own hooks.

apply.py      a pipeline's transformer gets hooks, and loses them
schedules.py  a scheduler's steps as flow times
run.py        one picture that is being cached: its step, its streams, its record
fingerprint.py  tells a calibration's model from others
outputs.py    what a model returns, taken apart and put together again
families.py   where transformers have their blocks, and TeaCache's F
published.py  TeaCache's rule by published coefficients
all_blocks.py  all blocks as one, by TeaCache's rule
whole_steps.py  the whole transformer computed or guessed
parts.py      attention and feed-forward layers, each by its own schedule
measure.py    uncached pictures, watched: a calibration
"""

from .apply import Caching, cache
from .measure import calibrate

__all__ = ["Caching", "cache", "calibrate"]
