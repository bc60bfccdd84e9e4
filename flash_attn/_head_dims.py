"""Head dimensions that have CUDA kernels of their own; others run in the next larger one.

Written by csrc/kernels/generate.py from csrc/kernels/kernel_list.py.
"""

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
MAX_HEAD_DIM = 256
