"""The quality of policies on benchmarks' tasks.

Not here: time (benchmark), and how weights are fitted (training).
"""
