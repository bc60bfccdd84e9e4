"""Operations with a Triton kernel for CUDA tensors; importing them needs neither Triton nor a GPU."""
