"""Files that are cut, padded or glued, files of other formats, and claims of great length."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

from tests.checkpoint.files import U8_PAIR, raw_file
from tests.checkpoint.hostile.cases import Case, single

GOOD = raw_file({"a": U8_PAIR}, b"12")
HEADER = len(GOOD) - 2
SHORT, BAD, FOREIGN = "TruncatedError", "MalformedError", "NotSafetensorsError"
WANTED = "expected a safetensors file"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


def _n(length: int) -> bytes:
    return struct.pack("<Q", length % 2**64)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\0.")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("model.safetensors")
        info.size = len(GOOD)
        archive.addfile(info, io.BytesIO(GOOD))
    return buffer.getvalue()


def _gzip() -> bytes:
    """So long that the first eight bytes, read as a length, fit into the file."""
    import random

    return gzip.compress(random.Random(1).randbytes(700_000), 1, mtime=0)


def _claims(data_bytes: int, offset: int) -> Case:
    """A sparse file that really is that long; one byte of its header is wrong."""
    fields = {"dtype": "U8", "shape": [data_bytes], "data_offsets": [offset, data_bytes + offset]}

    def write(folder: Path) -> Path:
        path = folder / "model.safetensors"
        blob = raw_file({"a": fields})
        with path.open("wb") as file:
            file.write(blob)
            file.truncate(len(blob) + data_bytes + offset)
        return path

    says = ("leave no hole: expected 0", f"got {offset}")
    return Case("100 GB that are there, off by one", write, BAD, says, "a")


def _hundred(where: int) -> bytes:
    size = 10**11
    fields = {"dtype": "U8", "shape": [size], "data_offsets": [where, where + size]}
    return raw_file({"a": fields}, b"1234")


LENGTHS = [
    single("empty file", b"", SHORT, "needs more than 8", "size is 0 bytes"),
    single("one byte", b"\x01", SHORT, "needs more than 8", "size is 1 bytes"),
    single("seven bytes", b"\x02\0\0\0\0\0\0", SHORT, "needs more than 8", "size is 7 bytes"),
    single("length 0", _n(0), BAD, "length must be above 0", "starts with zeros"),
    single("length 0 and data", _n(0) + b"{}", BAD, "length must be above 0"),
    single("never written", bytes(4096), BAD, "must be above 0", "as if never written"),
    single("length beyond the file", _n(100) + b"{}", SHORT, "needs 108", "size is 10 bytes"),
    single("length 2**64 - 1", _n(-1) + b"{}", BAD, "at most 100000000", f"got {2**64 - 1}"),
    single("length -8", _n(-8) + b"{}", BAD, "at most 100000000", f"got {2**64 - 8}"),
    single("length 2**63", _n(2**63) + b"{}", BAD, "at most 100000000", f"got {2**63}"),
    single("length above the limit", _n(10**8 + 1) + b"{}", BAD, "at most", "got 100000001"),
    single("length at the limit", _n(10**8) + b"{}", SHORT, "needs 100000008", "size is 10"),
    single("length big-endian", struct.pack(">Q", 2) + b"{}", BAD, "at most", f"got {2 << 56}"),
    single("length of 32 bits", struct.pack("<I", 2) + b"{}", SHORT, "more than 8", "size is 6"),
    single("length one too small", _n(HEADER - 9) + GOOD[8:], BAD, "expected ',' or '}'"),
    single("length one too large", _n(HEADER - 7) + GOOD[8:], BAD, "nothing more", "found '1'"),
    single("a byte too many", GOOD + b"3", BAD, "end with the last", "got 1 bytes after"),
    single("zip glued to the end", GOOD + _zip(), BAD, "end with the last", "bytes after them"),
    single("pdf glued to the end", GOOD + b"%PDF-1.7\n", BAD, "end with", "got 9 bytes after"),
    single("twice the same file", GOOD + GOOD, BAD, "end with", f"got {len(GOOD)} bytes after"),
    single("a byte short", GOOD[:-1], SHORT, "must have the 2 bytes", "got 1"),
    single("no data at all", GOOD[:-2], SHORT, "must have the 2 bytes", "got 0"),
    single("cut in the header", GOOD[: HEADER // 2], SHORT, f"needs {HEADER}", "size is"),
    single("cut after the length", GOOD[:8], SHORT, f"needs {HEADER}", "size is 8 bytes"),
    single("claims 100 GB", _hundred(0), SHORT, f"must have the {10**11} bytes", "got 4"),
    single("claims 100 GB later", _hundred(8), SHORT, f"must have the {10**11 + 8} bytes", "got 4"),
    _claims(10**11, 1),
]
FORMATS = [
    single("git-lfs pointer", LFS.encode(), FOREIGN, "git-lfs pointer", WANTED, "git lfs pull"),
    single(
        "git-lfs pointer of Windows",
        LFS.replace("\n", "\r\n").encode(),
        *(FOREIGN, "git-lfs pointer", WANTED, "git lfs pull"),
    ),
    single("web page", b"<!DOCTYPE html><html><body>", FOREIGN, "is a web page", WANTED),
    single("xml", b"<?xml version='1.0'?><Error/>", FOREIGN, "is a web page or XML", WANTED),
    single("a server's sentence", b"Entry not found", FOREIGN, "text, 'Entry not found'", WANTED),
    single("a server's 404", b"404: Not Found\r\n", FOREIGN, "text, '404: Not Found'", WANTED),
    single("config.json", b'{\n  "model_type": "llava"}', FOREIGN, "is a JSON text", WANTED),
    single(
        "an index for its weights",
        json.dumps({"weight_map": {"a": "x.safetensors"}}).encode(),
        *(FOREIGN, "is a JSON text", WANTED, "give the weights"),
    ),
    single("zip of torch.save", _zip, FOREIGN, "zip archive", "may run code", WANTED),
    single("pickle, protocol 2", b"\x80\x02}q\0X\1\0\0\0a.", FOREIGN, "pickle", "run code", WANTED),
    single("pickle, protocol 4", b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.", FOREIGN, "pickle", WANTED),
    single("pickle, protocol 5", b"\x80\x05\x95\x10\0\0\0\0\0\0\0}.", FOREIGN, "pickle", WANTED),
    single("gzip", gzip.compress(GOOD, mtime=1), FOREIGN, "compressed with gzip", WANTED),
    single("gzip that looks like a length", _gzip, FOREIGN, "compressed with gzip", WANTED),
    single("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(32), FOREIGN, "is an HDF5 file", WANTED),
    single("numpy", b"\x93NUMPY\x01\0v\0{'descr'", FOREIGN, "is a NumPy array", WANTED),
    single("gguf", b"GGUF\3\0\0\0\1\0\0\0\0\0", FOREIGN, "is a GGUF file", WANTED),
    single("tar", _tar, BAD, "length must be at most", "is no safetensors file"),
    single("png", b"\x89PNG\r\n\x1a\n" + bytes(64), BAD, "length must be at most"),
    single("elf", b"\x7fELF\2\1\1" + bytes(64), BAD, "length must be at most", "got 2825842"),
]
CASES = LENGTHS + FORMATS
