"""What layers read while a model runs.

pictures.py     what is drawn meanwhile: prompts, noise, times, which are held out
recorder.py     finds linears in any model, records their inputs
statistics.py   second moments and extremes, merged as they come
teacher.py      the 16-bit model that a quantized one is calibrated against
hessian.py      the Hessian of a layer's squared output error, and its Cholesky factor
"""
