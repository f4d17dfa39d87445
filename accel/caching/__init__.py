"""Steps and layers that need not be computed.

steps.py          what happens to each step: computed or reused, and the record of it
teacache.py       TeaCache's rule: the accumulated change of the model's input
smoothcache.py    SmoothCache's rule: calibrated errors of each layer
flow_time.py      the unit of noise in which all of it is measured
error_control.py  a rule of our own: the measured error of the last extrapolation
extrapolate.py    what stands for a result that is not computed
fitted.py         the same by weights that a calibration was fitted for
mask_search.py    the best steps to compute, by a calibration
calibration_recorder.py  what uncached runs teach
calibration_file.py   what a calibration holds, as a file
calibration_facts.py  what may be in such a file
coefficients.py   TeaCache's published polynomials (coefficients.json)
"""
