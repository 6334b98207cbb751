"""Operators for N models at once: torch operators with their own vmap rules, and their kernels."""
