"""A quantization, whatever the method: planned, measured, written.

recipe.py          options from a preset, and back from a file
checkpoint_run.py  prepare, measure, write: what every method shares
measurement.py     what a method learns from the model at work
monitor.py         progress, notes and Stop of a run
side_by_side.py    several layers at once on a CPU, one thread each
whole_groups.py    layers whose inputs are no multiple of the group size
run_metadata.py    what a file says of the run that made it
"""
