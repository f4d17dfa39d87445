"""FEATHER in vision-language text encoders.

prune.py      tokens dropped while an encoder reads a picture
encoders.py   the encoders that this fits, and where each has its pictures
scoring.py    which tokens a stage keeps
shortened.py  mask and positions of a sequence that tokens were taken out of
record.py     one run of the encoder: its images, and what was kept of them
report.py     the picture with its kept patches, and charts
"""
