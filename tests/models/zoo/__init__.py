"""Tiny models of transformers' own classes, one per family, with processor and data.

Each is saved as ``save_pretrained`` saves it, which is the layout of the published checkpoints.
"""

from tests.models.zoo.families import FAMILIES, PREPARED, Family, save_family

__all__ = ["FAMILIES", "PREPARED", "Family", "save_family"]
