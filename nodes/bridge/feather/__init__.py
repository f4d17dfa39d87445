"""FEATHER in vision-language text encoders.

prune.py   tokens dropped while an encoder reads a picture
report.py  which patches of the picture were kept
"""
