"""IntLoRA: adapters whose merged weight is integer (Guo et al., 2024, arXiv:2410.21759), trained or
converted, and merged without requantization.

adapter.py    one model's adapter
variants.py   MUL, SHIFT and SHIFT-ADD on the base's integers
factors.py    low-rank factors as integers, whose product is exact
auxiliary.py  the auxiliary matrix R, from a seed
rounding.py   a 16-bit weight as a base
file.py       an adapter on disk
convert.py    an ordinary LoRA to SHIFT-ADD, with a report
linear.py     a layer that trains
train.py      the loop
merge.py      adapters into the integers, or beside the kernel
"""
