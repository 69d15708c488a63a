"""What the machine gives this process: CPUs, threads, clocks.

Not here: the pool of threads (pool), and what a GPU's driver says (observe).
"""
