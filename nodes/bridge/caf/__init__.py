"""Constant Acceleration Flow around ComfyUI's sampling.

couplings.py      noise and the picture that a teacher made of it
teacher.py        the model, sampler and sigmas that make those pictures
train.py          the heads, learned from couplings
training_job.py   what is asked for, and the charts of it
student.py        the model in training, as both nets
load.py           a CAF file on a MODEL
sample.py         CAF Sampler
invert.py         CAF Invert
straight.py       the line from noise to data, whatever the model predicts
training_free.py  Adams-Bashforth steps, sigmas
"""
