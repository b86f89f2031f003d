"""The larger variant of the quality benchmark, for a GPU: ``python -m benchmarks.quality.large``.

Scenes of sixteen digits, a LLaVA of forty million parameters. Rows, choices, cells and tables are
those of ``benchmarks.quality``.
"""
