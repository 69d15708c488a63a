"""The `fluxion` command.

Not here: work of a node, and what fluxion_core offers as a library.
"""
