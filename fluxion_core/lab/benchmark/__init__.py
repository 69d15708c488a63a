"""Figures of machines, beside the limit of each.

Not here: quality (evaluation).
"""
