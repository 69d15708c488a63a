"""The host KV store: slabs in one arena, owned by sequences, found again by their text.

Not here: attention, and how KV arrives (kvstream, wire).
"""
