"""Log lines, metrics, traces, and what a GPU's driver says.

Not here: which figures a node has (services/*/metrics.py).
"""
