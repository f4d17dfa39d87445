"""Constant Acceleration Flow (Park et al., NeurIPS 2024, arXiv:2411.00322): few-step sampling along
curves of constant acceleration.

flow.py               the equations: the path, sampling, inversion
heads.py              both nets from one flow model with two heads
coordinates.py        models that predict noise or v, on a flow's straight line
adapter.py            the heads beside a model
heads_file.py         the heads as a file
objectives.py         what to minimise for the two nets
couplings.py          noise and a teacher's data, in a folder that grows
couplings_files.py    the files of that folder
inspect.py            what these files are, for people
conditioning_tree.py  prompts as JSON beside tensors
adams_bashforth.py    constant acceleration without training
"""
