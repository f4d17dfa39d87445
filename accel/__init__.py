"""accel/ - less work: which steps, layers and tokens need not be computed. Pure algorithms: tensors in, tensors out; no model is known here."""
