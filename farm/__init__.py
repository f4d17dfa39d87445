"""farm/ - many checkpoints quantized over many machines, each by the command line that one is
quantized with.

command.py     python ComfyUI-Nibble farm: what can be typed
jobs.py        what is to be made: models × recipes, each a job
jobs_file.py   the same from a file
watch.py       a folder, and models that come into it
needs.py       what a job takes of a machine, from its model's shapes
run.py         jobs to a runner, events back, until all are done
ledger.py      where each job stands, and what an earlier run did of it
in_order.py    a runner: here, one job after another
on_ray.py      a runner: over a cluster, by a driver that may die
ray_driver.py  that driver, a program of its own: all that knows Ray
work.py        one job on the machine that it came to
table.py       what is going on, for people
report.py      what was done, as JSON and as a page
"""
