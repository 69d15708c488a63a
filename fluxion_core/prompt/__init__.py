"""A prompt on the prefill node: attention over it, and its KV on its way out.

Not here: whose turn it is (services/prefill/engine.py), and prompts that are computed on a decode
node (decode/chunk.py).
"""
