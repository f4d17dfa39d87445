"""The loop that every trainer uses: optimizer, checkpoints, resuming.

loop.py
"""
