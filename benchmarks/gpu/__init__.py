"""Checks and measurements on a GPU: ``benchmarks/gpu.sh check|kernels|block|e2e``.

``python -m benchmarks.gpu PART --dry-run`` runs a part from start to end at tiny sizes, on the CPU
under Triton's interpreter where there is no card.
"""
