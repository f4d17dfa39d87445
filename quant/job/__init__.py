"""A quantization, whatever the method: planned, measured, written.

recipe.py          options from a preset, and back from a file
checkpoint_run.py  prepare, measure, write: what every method shares
parts.py           ranges of a checkpoint's layers, each made by itself
joining.py         such parts joined into their target
measurement.py     what a method learns from the model at work
monitor.py         progress, notes and Stop of a run
side_by_side.py    several layers at once on a CPU, one thread each
whole_groups.py    layers whose inputs are no multiple of the group size
run_metadata.py    what a file says of the run that made it
"""
