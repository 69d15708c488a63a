"""Offline work: training, evaluation, benchmarks, their results and pictures.

Not here: anything that a node imports.
"""
