"""accel/ - less work: which steps of a sampling run, which layers and which tokens need not be
computed. Pure algorithms: no model, no host.
"""
