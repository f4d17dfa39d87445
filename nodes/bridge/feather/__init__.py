"""FEATHER in vision-language text encoders.

prune.py    tokens dropped while an encoder reads a picture
scoring.py  which tokens a stage keeps
record.py   one run of the encoder: its images, and what was kept of them
report.py   the picture with its kept patches, and charts
"""
