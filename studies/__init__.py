"""Empirical studies that anyone can run again: see ``studies/README.md``."""
