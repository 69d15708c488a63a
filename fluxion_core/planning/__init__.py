"""Plans of what each head reads: policies, predictor and selector.

Not here: reading itself (decode), and how weights are fitted (lab/training).
"""
