"""Messages and stubs, made from the .proto files beside them.

Not here: anything written by hand.
"""
