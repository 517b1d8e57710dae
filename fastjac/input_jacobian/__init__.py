"""Penalties on the input Jacobian, and the engines that compute products with it."""
