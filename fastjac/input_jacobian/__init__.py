"""Penalties on the input Jacobian: what asks for it, and the ways to get it."""
