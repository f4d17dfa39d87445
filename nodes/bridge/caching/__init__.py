"""TeaCache and SmoothCache around ComfyUI's sampling.

settings.py          a node's widgets become settings; presets
apply.py             a clone of the MODEL with our wrappers
run.py               one sampling run: its streams, steps and record
wrap_steps.py        whole steps
wrap_blocks.py       all blocks as one
wrap_sublayers.py    every block, or its parts
hooks.py             a visitor at every block
shadow.py            stand-ins for sub-modules
joint_attention.py   the attention of blocks that compute it among their own lines
models.py            where each model family can be hooked
features.py          what TeaCache watches of a model
controlnet.py        ControlNets run only for computed steps
sample.py            TeaCache Sampler
calibrate.py         Calibrate Cache
measure.py           one uncached run, watched
calibration_file.py  what a calibration holds, on disk
charts.py            the strip of steps, and calibrations
"""
