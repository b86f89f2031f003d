"""Checkpoints: safetensors in, safetensors out, strict, streaming and atomic. Knows no op.

``open_checkpoint`` reads, ``match_pair`` compares BASE and TUNED, ``plan_layout`` lays an output
out from headers alone, ``StagedCheckpoint`` writes it: OUT is absent or complete.
"""

from tailor_fast.checkpoint.card import model_card, model_name, read_license
from tailor_fast.checkpoint.dtypes import DTYPES, byte_size, dtype_name, torch_dtype
from tailor_fast.checkpoint.errors import (
    ChangedError,
    CheckpointError,
    DiskFullError,
    IncompleteError,
    MalformedError,
    MismatchError,
    MissingFileError,
    NoSpaceError,
    NotSafetensorsError,
    OutputExistsError,
    OutputLockedError,
    OutputPlaceError,
    TransferError,
    TruncatedError,
    UnsupportedDtypeError,
)
from tailor_fast.checkpoint.hashed import Hashed
from tailor_fast.checkpoint.hashing import HashName, TensorHasher, checkpoint_root
from tailor_fast.checkpoint.hub import is_hub_name, local_path
from tailor_fast.checkpoint.pair import TensorPair, match_pair
from tailor_fast.checkpoint.plan import Layout, Placement, TensorSpec, plan_layout
from tailor_fast.checkpoint.reader import Checkpoint, ShardInfo, TensorInfo, open_checkpoint
from tailor_fast.checkpoint.records import (
    CheckpointRecord,
    FileRecord,
    build_manifest,
    input_record,
)
from tailor_fast.checkpoint.sidefiles import CARD_NAME, MANIFEST_NAME, REPORT_NAME
from tailor_fast.checkpoint.sizes import parse_size, shown_size
from tailor_fast.checkpoint.writer import StagedCheckpoint, StagedFile

__all__ = [
    "CARD_NAME",
    "DTYPES",
    "MANIFEST_NAME",
    "REPORT_NAME",
    "ChangedError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointRecord",
    "DiskFullError",
    "FileRecord",
    "HashName",
    "Hashed",
    "IncompleteError",
    "Layout",
    "MalformedError",
    "MismatchError",
    "MissingFileError",
    "NoSpaceError",
    "NotSafetensorsError",
    "OutputExistsError",
    "OutputLockedError",
    "OutputPlaceError",
    "Placement",
    "ShardInfo",
    "StagedCheckpoint",
    "StagedFile",
    "TensorHasher",
    "TensorInfo",
    "TensorPair",
    "TensorSpec",
    "TransferError",
    "TruncatedError",
    "UnsupportedDtypeError",
    "build_manifest",
    "byte_size",
    "checkpoint_root",
    "dtype_name",
    "input_record",
    "is_hub_name",
    "local_path",
    "match_pair",
    "model_card",
    "model_name",
    "open_checkpoint",
    "parse_size",
    "plan_layout",
    "read_license",
    "shown_size",
    "torch_dtype",
]
