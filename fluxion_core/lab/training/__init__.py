"""Predictor weights fitted to a model, and how good they are.

Not here: the predictor itself (planning).
"""
