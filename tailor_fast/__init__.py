"""Model Tailor as a performance library: repair a fine-tuned model's forgetting by a sparse patch.

Source of the method: Zhu et al., "Model Tailor", ICML 2024, arXiv 2402.12048.
"""

from tailor_fast._version import __version__

__all__ = ["__version__"]
