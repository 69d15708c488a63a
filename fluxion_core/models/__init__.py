"""Model files into a decoder of the Llama family, which asks for attention through one port.

Not here: attention, KV, and the text of tokens (generation).
"""
