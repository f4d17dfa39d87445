"""accel/ - less work: which steps of a sampling run, which layers and which tokens need not be
computed. Pure algorithms: no model, no host.

caching/    TeaCache, SmoothCache, and a rule of our own: results that are reused
caf/        Constant Acceleration Flow: few steps along curves
feather.py  FEATHER: visual tokens that a vision-language model may forget
"""
