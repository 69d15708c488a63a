"""The device tier of the KV store: selection, resident blocks and their upkeep, as kernels."""
