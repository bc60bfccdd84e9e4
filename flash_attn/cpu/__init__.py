"""The CPU backend: attention in torch operations, of the same contract as the CUDA kernels.

``attention`` computes dense tensors, ``varlen`` sequences of different lengths, ``decode`` caches and
merged results; ``scores`` knows one tile's masks, softcap and ALiBi, ``philox`` the random numbers of
dropout.
"""
