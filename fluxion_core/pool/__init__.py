"""The CPU pool: pinned native threads, how many, what they did, and their simulator.

Not here: what tasks do (kernels).
"""
