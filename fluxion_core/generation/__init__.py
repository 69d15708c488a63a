"""Text to tokens and back, logits to a token, and when to stop.

Not here: weights, KV, and other sequences of a step.
"""
