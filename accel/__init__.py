"""accel/ - less work: which steps of a sampling run, which layers and which tokens need not be
computed. Pure algorithms, no model and no host, but for the room of diffusers.

caching/    steps and layers that are reused: TeaCache, SmoothCache, error control
diffusers/  the same around pipelines of diffusers, in scripts
caf/        few-step sampling along curves of constant acceleration
feather.py  visual tokens that a text encoder may forget
"""
