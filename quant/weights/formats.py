"""The 4-bit formats by the name that a layer's JSON gives them."""

from .awq_w4a16 import W4A16Weight
from .svdquant_w4a4 import SVDQuantWeight

FORMATS = {cls.FORMAT: cls for cls in (SVDQuantWeight, W4A16Weight)}
