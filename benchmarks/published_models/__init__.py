"""Forty published models with random weights: what fastjac finds, whether it is right, its cost."""
