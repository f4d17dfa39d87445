"""IntLoRA's nodes.

files.py    find and name IntLoRA files
bases.py    the integers of a MODEL
rounded.py  a 16-bit MODEL rounded to integers, and IntLoRAs of those
convert.py  an ordinary LoRA to an IntLoRA
apply.py    an IntLoRA beside a MODEL's weights
fold.py     IntLoRAs and patches into one layer
merge.py    IntLoRAs into a MODEL's layers, in memory
save.py     a MODEL with all that is on it, as a new file
train.py    Train IntLoRA
charts.py   how much of a LoRA each layer keeps
"""
