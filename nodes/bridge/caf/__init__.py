"""Constant Acceleration Flow around ComfyUI's sampling.

training_free.py  the Adams-Bashforth sampler and its sigmas
couplings.py      Make CAF Couplings
train.py          Train CAF
load.py           Load CAF Model: both nets on one MODEL
sample.py         CAF Sampler and CAF Invert
"""
