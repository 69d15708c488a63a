"""The parts that both nodes, the command and the lab are made of.

Not here: processes, which are in services.
"""
