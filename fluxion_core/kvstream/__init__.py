"""The hand-off of a prompt's KV: its layout, its frames, and what makes a stream whole.

Not here: bytes on a connection (wire), and nodes.
"""
