"""Ahead-of-time compilation of Triton kernels for cards that are not here."""
