"""Configurations for fusion_bench: ``hydra.searchpath`` finds them with ``pkg://`` before it."""
