"""How the memory of a run without data is divided: a ring, and what one part of a layer takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tailor_fast.patching.pipeline import Part
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.ring import aligned
from tailor_fast.patching.sources import LayerOnDisk, Sources

# The ring has room for four layers, so that reading and writing go on while two are solved. Less of
# it stays in the caches better, and fresh memory costs time; more would not help.
LEAST_RING_BYTES, RING_BYTES = 192 << 20, 768 << 20
_LAYERS = 4
COPY_BYTES = 8 << 20  # most of a tensor that is copied in one part
READERS = 2  # threads that read TUNED: the pipeline's, and the caller's
SOLVERS = 2  # layers that are solved side by side
_PARTS = 8  # that the ring holds at least of a layer that streams through it
# What select takes per element beside the pair: the mask, and candidates of its threshold.
_SELECT_BYTES = 1.25
_SCRATCH_BYTES = 3 << 20  # of a layer at work, whatever its size
# A threshold that spans parts takes candidates from all of them; beside them a quarter as many of
# the part at hand, and room to sift some.
KEYS_BYTES, _SIFT_BYTES = 64 << 20, 4 << 20
_KEYS_SHARE = 8  # of a limit, at most one part in so many is for candidates
# Digests, headers, stacks of threads, pieces in flight, scratch, the picture.
FIXED_BYTES = 16 << 20


@dataclass(frozen=True)
class Memory:
    """Memory beyond the loaded program, in bytes.

    Attributes:
        ring: for what is on its way between the files.
        beside: for the largest part of a layer, while its threshold is sought or while it is
            solved, and for what reading takes.
        keys: of ``beside``, for candidates of a threshold that spans parts.
    """

    ring: int
    beside: int
    keys: int

    @property
    def total(self) -> int:
        """All of it but the fixed buffers."""
        return self.ring + self.beside


def divide_memory(sources: Sources, recipe: Recipe, limit: int | None) -> Memory:
    """Choose the largest ring that ``limit`` allows, if it can hold what one layer needs."""
    layers = sources.layers
    reading = READERS * sources.tuned.checkpoint.reading_bytes
    least = max(_least_ring(sources, layer, recipe) for layer in layers)
    whole = sum(2 * aligned(info.nbytes) for info in sources.joined.tensors.values())
    wanted = max(LEAST_RING_BYTES, _LAYERS * max(_pair_bytes(sources, layer) for layer in layers))
    ring = max(least, min(RING_BYTES, wanted, whole))
    keys = KEYS_BYTES if limit is None else min(KEYS_BYTES, limit // _KEYS_SHARE)
    while True:
        beside = max(_solving(sources, layer, ring) for layer in layers)
        if _spans_parts(sources, recipe, ring):  # before anything is solved, a part at a time
            copies = max(_copies(sources, layer) for layer in layers)
            beside = max(beside, copies + keys + keys // 4 + _SIFT_BYTES)
        memory = Memory(ring, reading + beside, keys)
        if limit is None or memory.total <= limit or ring == least:
            return memory
        ring = max(least, aligned(ring * 7 // 8))


def parts_of(sources: Sources, layer: LayerOnDisk, ring: int) -> Iterator[Part]:
    """Cut a layer into parts of whole rows: one, if both inputs fit into the ring.

    A tensor of several matrices is cut into these.
    """
    nbytes = sources.tuned.checkpoint.tensors[layer.tensor].nbytes
    step = _rows_at_once(sources, layer, ring) * (nbytes // max(1, layer.shape[0]))
    for begin in range(0, nbytes, max(1, step)):
        yield Part(layer.tensor, begin, min(nbytes, begin + step))


def copy_parts(sources: Sources, name: str) -> Iterator[Part]:
    """Cut a tensor that is copied, each part from the input that it comes from."""
    for origin in sources.origins(name):
        for begin in range(origin.begin, origin.end, COPY_BYTES):
            yield Part(name, begin, min(origin.end, begin + COPY_BYTES), (origin.side,))


def is_cut(sources: Sources, layer: LayerOnDisk, ring: int) -> bool:
    """Whether a layer is worked on some rows at a time, because the ring does not hold it."""
    return _rows_at_once(sources, layer, ring) < layer.shape[0]


def _spans_parts(sources: Sources, recipe: Recipe, ring: int) -> bool:
    """Whether a threshold is sought that several parts, or several layers, have in common."""
    if recipe.scope in ("layer", "global"):
        return True
    cut = (layer for layer in sources.layers if is_cut(sources, layer, ring))
    return recipe.scope == "tensor" and any(layer.slices == 1 for layer in cut)


def _streams(layer: LayerOnDisk, recipe: Recipe) -> bool:
    """Whether the mask of some rows can be found without the others in memory."""
    if layer.target.transposed:  # rows are columns on disk
        return False
    if recipe.scope in ("layer", "global"):
        return recipe.normalize != "tensor"
    return recipe.scope != "block"


def _pair_bytes(sources: Sources, layer: LayerOnDisk) -> int:
    return 2 * aligned(sources.tuned.checkpoint.tensors[layer.tensor].nbytes // layer.slices)


def _least_ring(sources: Sources, layer: LayerOnDisk, recipe: Recipe) -> int:
    nbytes = sources.tuned.checkpoint.tensors[layer.tensor].nbytes
    if layer.slices > 1 or not _streams(layer, recipe):
        return _pair_bytes(sources, layer)
    return 2 * _PARTS * max(aligned(nbytes // max(1, layer.shape[0])), COPY_BYTES // _PARTS)


def _solving(sources: Sources, layer: LayerOnDisk, ring: int) -> int:
    rows, cols = _rows_at_once(sources, layer, ring), layer.shape[1]
    if layer.target.transposed:
        rows = layer.shape[0] // layer.slices
    taken = int(rows * cols * _SELECT_BYTES) + _SCRATCH_BYTES
    return SOLVERS * (_copies(sources, layer) + taken)


def _copies(sources: Sources, layer: LayerOnDisk) -> int:
    """What a layer's matrices take that do not lie in memory as they are worked on."""
    if not layer.target.transposed:
        return 0
    return 2 * sources.tuned.checkpoint.tensors[layer.tensor].nbytes // layer.slices


def _rows_at_once(sources: Sources, layer: LayerOnDisk, ring: int) -> int:
    nbytes = sources.tuned.checkpoint.tensors[layer.tensor].nbytes
    rows = layer.shape[0]
    if layer.slices > 1:
        return rows // layer.slices
    if 2 * aligned(nbytes) <= ring:
        return rows
    return max(1, ring // (2 * _PARTS) // (nbytes // rows))
