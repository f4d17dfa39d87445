"""Training of something small beside a frozen model; knows no method.

loop.py       the optimizer's loop: warm-up, interruption
state.py      what a stopped run goes on from, on disk
recompute.py  blocks trained through: checkpointing, blocks that write in place
"""
