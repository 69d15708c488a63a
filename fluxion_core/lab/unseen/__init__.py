"""Budgets on a model that nothing was fitted to: which source of head profiles promises what.

Nothing of the product imports it.
"""
