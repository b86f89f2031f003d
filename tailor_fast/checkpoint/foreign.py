"""What a file is that is no safetensors file, from its first bytes."""

from tailor_fast.checkpoint.errors import AnyPath, NotSafetensorsError, quoted

CONVERT = "convert it to safetensors first, with the tool that wrote it"
_DOWNLOAD = "download the file itself"
_FEWEST = 8  # characters of what counts as text
_PICKLE = "is a Python pickle, which may run code when loaded"
# first bytes -> what the file is, what to do
_FORMATS = (
    (b"version https://git-lfs", "is a git-lfs pointer", "run `git lfs pull`"),
    (b"<", "is a web page or XML", _DOWNLOAD),
    (b"{", "is a JSON text", "give the weights that it belongs to"),
    (b"PK\x03\x04", "is a zip archive, probably a torch pickle, which may run code", CONVERT),
    *((bytes((0x80, protocol)), _PICKLE, CONVERT) for protocol in (2, 3, 4, 5)),
    (b"\x1f\x8b\x08", "is compressed with gzip", "unpack it first"),
    (b"\x89HDF", "is an HDF5 file", CONVERT),
    (b"\x93NUMPY", "is a NumPy array", CONVERT),
    (b"GGUF", "is a GGUF file", "give the safetensors checkpoint it was made from"),
)


def refuse_foreign(prefix: bytes, path: AnyPath, fewest: int = 1) -> None:
    """Return unless the first bytes of ``path`` are those of another format, or a line of text.

    Args:
        prefix: the first 64 bytes, or all there are.
        path: the file, for the message.
        fewest: bytes by which a format must be known to be looked for.

    Raises:
        NotSafetensorsError: the sentence says what the file is.
    """
    expected = "expected a safetensors file"
    for magic, what, remedy in _FORMATS:
        if len(magic) >= fewest and prefix.startswith(magic):
            raise NotSafetensorsError(f"{what}; {expected}", path=path, remedy=remedy)
    line = prefix.partition(b"\n")[0].decode("ascii", "replace").rstrip("\r")
    if len(line) >= _FEWEST and line.isascii() and line.isprintable():
        problem = f"is a text, {quoted(line)}; {expected}"  # what a server says instead of a file
        raise NotSafetensorsError(problem, path=path, remedy=_DOWNLOAD)
