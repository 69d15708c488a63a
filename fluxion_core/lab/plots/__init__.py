"""Pictures.

Not here: what is drawn is measured elsewhere.
"""
