"""Processes: two nodes, and the command that starts and asks them.

Not here: anything that fluxion_core needs.
"""
