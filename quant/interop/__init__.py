"""4-bit files of other programs (Nunchaku's, comfy-kitchen's), read as if they were Nibble's own,
and written for those programs.
"""
