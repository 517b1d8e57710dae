"""Varga, Csiszárik, Zombori 2017: ``python -m studies.gradient_regularization``."""
