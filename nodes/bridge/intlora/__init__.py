"""IntLoRA's nodes.

files.py   find, convert and apply IntLoRA files
train.py   Train IntLoRA
merge.py   into the layers, or into a file of their own
charts.py  how much of a LoRA each layer keeps
"""
