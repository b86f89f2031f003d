"""What a checkpoint consisted of, by digests, and the manifest that keeps it beside an output."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tailor_fast.checkpoint.hashing import HashName, checkpoint_root
from tailor_fast.checkpoint.source import TensorSource

MANIFEST_FORMAT = "tailor-manifest/1"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its size, and SHA-256 of its bytes or, for weights, of its header.

    A weight file is determined by its header and the digests of its tensors, so that nothing has to
    be read a second time for it.
    """

    nbytes: int
    sha256: str | None = None
    header_sha256: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Return what the manifest holds of the file."""
        key = "sha256" if self.header_sha256 is None else "header_sha256"
        return {"bytes": self.nbytes, key: self.header_sha256 or self.sha256}


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Files and tensor digests of one checkpoint; ``root`` is None where a digest is missing."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, str]
    root: str | None

    def as_dict(self) -> dict[str, object]:
        """Return what the manifest holds of the checkpoint."""
        files = {name: record.as_dict() for name, record in self.files.items()}
        return {"files": files, "tensors": dict(self.tensors), "root": self.root}


def input_record(
    checkpoint: TensorSource, digests: Mapping[str, str], algorithm: HashName = "xxh3-128"
) -> CheckpointRecord:
    """Record an input from the digests that were taken while it was read.

    Args:
        checkpoint: the input.
        digests: per tensor; tensors that were not read may be absent.
        algorithm: the one of ``digests``.

    Raises:
        ValueError: a digest of a tensor that the checkpoint does not have.
    """
    unknown = [name for name in digests if name not in checkpoint.tensors]
    if unknown:
        raise ValueError(f"input_record: digests must be of its tensors; got {unknown[0]!r}")
    files = {
        shard.file_name: FileRecord(shard.snapshot.size, header_sha256=shard.header_sha256)
        for shard in checkpoint.shards
    }
    complete = len(digests) == len(checkpoint.tensors)
    root = checkpoint_root(digests, algorithm) if complete else None
    return CheckpointRecord(files, dict(digests), root)


def build_manifest(
    *,
    inputs: Mapping[str, CheckpointRecord],
    output: CheckpointRecord,
    recipe: Mapping[str, object],
    versions: Mapping[str, str],
    algorithm: HashName = "xxh3-128",
) -> bytes:
    """Return ``tailor_manifest.json``: the same arguments give the same bytes.

    Args:
        inputs: by role, as ``base`` and ``tuned``.
        output: of the checkpoint that is being written.
        recipe: what was asked for; must be plain JSON.
        versions: of the software that took part.
        algorithm: of the tensor digests.
    """
    manifest = {
        "format": MANIFEST_FORMAT,
        "tensor_digest": algorithm,
        "recipe": recipe,
        "versions": versions,
        "inputs": {role: record.as_dict() for role, record in inputs.items()},
        "output": output.as_dict(),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()
