"""Settings: their types, and the one place where flags, variables and files are read.

Not here: what a setting does, and those of one node alone (services/*/config.py).
"""
