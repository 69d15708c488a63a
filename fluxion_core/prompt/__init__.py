"""A prompt through a model: attention over it, and its KV on its way out.

The prefill node, evaluation, training and benchmarks compute prompts here, by `compute.py`.

Not here: whose turn it is (services/prefill/line.py), and prompts that are computed on a decode
node (decode/chunk.py, decode/device/prompts.py).
"""
