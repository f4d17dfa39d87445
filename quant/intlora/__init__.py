"""IntLoRA: adapters whose merged weight is integer (Guo et al., 2024, arXiv:2410.21759), trained or
converted, and merged without requantization.

    base       the integers of any evenly spaced 4-bit or int8 weight        variants  MUL, SHIFT
      and SHIFT-ADD on them
    factors    low-rank factors as integers, whose product is exact          noise     the auxiliary
      matrix, from a seed
    adapter    one model's adapter; file: on disk                            convert   an ordinary
      LoRA to SHIFT-ADD, with a report
    linear     a layer that trains; train: the loop                          merge     into the
      integers, beside the kernel, or into a 4-bit layer
    weight     a merged layer on its own
"""
