"""What layers read while a model runs.

recorder.py     finds linears in any model, replaces them, records their inputs
statistics.py   second moments and extremes, merged as they come
measurement.py  recorded inputs, or the model at work: what a quantization is given
hessian.py      the Hessian of a layer's squared output error, and its Cholesky factor
"""
