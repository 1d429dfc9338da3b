"""Kernels that no chip has run yet."""
