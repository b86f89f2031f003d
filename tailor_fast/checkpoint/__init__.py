"""Checkpoints: safetensors in, safetensors out, strict, streaming and atomic. Knows no op.

``open_checkpoint`` reads, ``open_tuned`` an adapter too, ``join_pair`` compares BASE and TUNED,
``plan_layout`` lays an output out from headers alone, ``StagedCheckpoint`` writes it: OUT is absent
or complete.
"""

from tailor_fast.checkpoint.adapter import Renamed, adapter_files, is_adapter, open_tuned
from tailor_fast.checkpoint.adapter_config import AdapterConfig, read_adapter_config
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
    NotDurableError,
    NotSafetensorsError,
    OutputExistsError,
    OutputLockedError,
    OutputPlaceError,
    ResumeError,
    TransferError,
    TruncatedError,
    UnsupportedDtypeError,
)
from tailor_fast.checkpoint.hashed import Hashed
from tailor_fast.checkpoint.hashing import HashName, TensorHasher, checkpoint_root
from tailor_fast.checkpoint.held import Held
from tailor_fast.checkpoint.hub import is_hub_name, local_path
from tailor_fast.checkpoint.journal import Resume, ResumeMode
from tailor_fast.checkpoint.pair import Joined, Origin, Side, join_pair, match_pair, refuse_shape
from tailor_fast.checkpoint.plan import Layout, Placement, TensorSpec, plan_layout
from tailor_fast.checkpoint.reader import Checkpoint, ShardInfo, TensorInfo, open_checkpoint
from tailor_fast.checkpoint.records import (
    MANIFEST_FORMAT,
    CheckpointRecord,
    FileRecord,
    build_manifest,
    input_record,
)
from tailor_fast.checkpoint.sidefiles import CARD_NAME, MANIFEST_NAME, REPORT_NAME
from tailor_fast.checkpoint.sizes import parse_size, shown_size
from tailor_fast.checkpoint.source import TensorSource
from tailor_fast.checkpoint.writer import StagedCheckpoint, StagedFile

__all__ = [
    "CARD_NAME",
    "DTYPES",
    "MANIFEST_FORMAT",
    "MANIFEST_NAME",
    "REPORT_NAME",
    "AdapterConfig",
    "ChangedError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointRecord",
    "DiskFullError",
    "FileRecord",
    "HashName",
    "Hashed",
    "Held",
    "IncompleteError",
    "Joined",
    "Layout",
    "MalformedError",
    "MismatchError",
    "MissingFileError",
    "NoSpaceError",
    "NotDurableError",
    "NotSafetensorsError",
    "Origin",
    "OutputExistsError",
    "OutputLockedError",
    "OutputPlaceError",
    "Placement",
    "Renamed",
    "Resume",
    "ResumeError",
    "ResumeMode",
    "ShardInfo",
    "Side",
    "StagedCheckpoint",
    "StagedFile",
    "TensorHasher",
    "TensorInfo",
    "TensorSource",
    "TensorSpec",
    "TransferError",
    "TruncatedError",
    "UnsupportedDtypeError",
    "adapter_files",
    "build_manifest",
    "byte_size",
    "checkpoint_root",
    "dtype_name",
    "input_record",
    "is_adapter",
    "is_hub_name",
    "join_pair",
    "local_path",
    "match_pair",
    "model_card",
    "model_name",
    "open_checkpoint",
    "open_tuned",
    "parse_size",
    "plan_layout",
    "read_adapter_config",
    "read_license",
    "refuse_shape",
    "shown_size",
    "torch_dtype",
]
