"""The machine as this process has it: CPUs, threads, clocks.

Not here: the pool of threads (pool), and what a GPU's driver says (observe).
"""
