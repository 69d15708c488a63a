"""Keys of 2 bits, by which blocks are ranked."""
