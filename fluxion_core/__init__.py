"""The parts that both nodes, the command and the lab are made of.

Not here: processes, which are in services.
"""

DISTRIBUTION = "fluxion-inference"
"""What pip knows it as: the name of the command belongs to somebody else's package there."""
