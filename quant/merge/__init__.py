"""Any change of low rank into a 4-bit layer's own integers.

integer_grid.py  the integers, scales and zero points of a layer, as one grid
refit.py         a change fitted into the codes and the branch at unchanged rank
"""
