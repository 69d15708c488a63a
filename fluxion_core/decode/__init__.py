"""A decode step over the host KV store, with a body for the CPU and one for a CUDA device.

Not here: which sequences take part and which token they get (services/decode/engine.py), and how
KV came into the store.
"""
