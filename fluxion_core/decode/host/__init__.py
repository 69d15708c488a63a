"""A decode step without a GPU: the CPU pool computes the dense part and attends.

Not here: anything of CUDA.
"""
