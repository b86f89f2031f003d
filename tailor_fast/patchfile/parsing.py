"""The plan of a patch file, read strictly: everything it says must fit everything else it says."""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from tailor_fast.checkpoint import DTYPES, Checkpoint, HashName, MalformedError
from tailor_fast.checkpoint.errors import listed, quoted
from tailor_fast.checkpoint.hashing import HASHES, new_hash
from tailor_fast.checkpoint.header import MAX_DIM, MAX_RANK, MAX_TENSORS
from tailor_fast.patchfile.errors import NotPatchError
from tailor_fast.patchfile.layout import (
    FORMAT,
    PARTS,
    PatchEntry,
    PatchPlan,
    plan_text,
    stored_specs,
    text_digest,
)

_KEYS = {"format", "tailor_format", "digest", "plan", "plan_digest"}
_TENSORS = ',"tensors":{'
_LONGEST = 1 << 14  # characters of a member: a name of 1024 bytes, 64 sizes, five digests
_DECODER = json.JSONDecoder()
_AGAIN = "fetch the patch again, or make it again with `tailor-fast diff`"


def read_plan(file: Checkpoint) -> PatchPlan:
    """Read the plan of an open file and check that the file holds exactly what it announces.

    Raises:
        NotPatchError: a safetensors file of another kind, or another version of the format.
        MalformedError: the plan contradicts itself, its digest, or the file.
    """
    metadata = file.shards[0].metadata
    if metadata.get("tailor_format") != FORMAT:
        got = quoted(metadata.get("tailor_format", "none"))
        problem = f"is no patch file: tailor_format must be {FORMAT!r}; got {got}"
        raise NotPatchError(problem, path=file.path, remedy="give what `tailor-fast diff` wrote")
    if metadata.keys() != _KEYS or metadata["format"] != "pt":
        got = f"{listed(sorted(metadata))}, format {quoted(metadata.get('format', 'none'))}"
        _malformed(file, f"metadata must be {listed(sorted(_KEYS))}, format 'pt'; got {got}")
    algorithm = next((name for name in HASHES if name == metadata["digest"]), None)
    if algorithm is None:
        got = quoted(metadata["digest"])
        _malformed(file, f"digest must be one of {', '.join(HASHES)}; got {got}")
    kind: HashName = algorithm  # type: ignore[assignment]  # one of its names
    text = metadata["plan"]
    if text_digest(text, kind) != metadata["plan_digest"]:
        expected = quoted(metadata["plan_digest"])
        _malformed(file, f"plan must have the digest {expected}; got {text_digest(text, kind)}")
    try:
        plan = _plan(text, kind)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _malformed(file, f"plan is not what the format allows: {error!r}")
    if plan_text(plan) != text:  # a field too many, another order or spelling, a wrong root
        _malformed(file, "plan must be in canonical form: these fields, in this order, no spaces")
    _check_parts(file, plan)
    return plan


def _malformed(file: Checkpoint, problem: str, tensor: str | None = None) -> NoReturn:
    raise MalformedError(problem, path=file.path, tensor=tensor, remedy=_AGAIN)


def _plan(text: str, algorithm: HashName) -> PatchPlan:
    begin = text.find(_TENSORS, 0, _LONGEST)
    if begin < 0:
        raise ValueError(f"expected {_TENSORS} after base and target")
    head = json.loads(f"{text[:begin]}}}")
    names = str(head["base"]["name"]), str(head["target"]["name"])
    digest = re.compile(f"[0-9a-f]{{{len(new_hash(algorithm).hexdigest())}}}")
    members = _members(text, begin + len(_TENSORS))
    entries = sorted(
        (_entry(name, fields, digest) for name, fields in members), key=lambda entry: entry.name
    )
    return PatchPlan(*names, algorithm, tuple(entries))


def _members(text: str, at: int) -> Iterator[tuple[str, Any]]:
    """Take the members of an object that begins at ``at``, behind its brace.

    One after the other, each from a short piece of the text: what a hostile plan makes of millions
    of brackets is never in memory.
    """
    taken = 0
    while taken or not text.startswith("}", at):
        piece = text[at : at + _LONGEST]
        name, end = _DECODER.raw_decode(piece)
        if type(name) is not str or piece[end : end + 1] != ":":
            raise ValueError(f"expected a name and ':' at character {at}")
        fields, end = _DECODER.raw_decode(piece, end + 1)
        taken += 1
        if taken > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS} tensors")
        yield name, fields
        at += end + 1
        if piece[end : end + 1] != ",":
            return  # the object's end, which the canonical form then shows


def _entry(name: str, fields: Any, digest: re.Pattern[str]) -> PatchEntry:
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    sizes_fit = all(type(size) is int and 0 <= size <= MAX_DIM for size in shape)
    if dtype not in DTYPES or len(shape) > MAX_RANK or not sizes_fit:
        raise ValueError(f"{quoted(name)} is no tensor of the format")
    changed, base = fields.get("changed", 0), fields["base"]
    target = fields["target"] if changed else base
    parts = tuple(fields["parts"][part] for part in PARTS) if changed else ()
    for value in (base, target, *parts):
        if not digest.fullmatch(value):
            raise ValueError(f"digest of {quoted(name)} must be {digest.pattern}")
    entry = PatchEntry(name, dtype, shape, changed, base, target, parts)
    if type(changed) is not int or not 0 <= changed <= entry.words:
        raise ValueError(f"changed of {quoted(name)} must be in [0, {entry.words}]; got {changed}")
    if changed and base == target:
        raise ValueError(f"{quoted(name)} is stored, but equal in base and target")
    return entry


def _check_parts(file: Checkpoint, plan: PatchPlan) -> None:
    announced = {spec.name: (spec.dtype, spec.shape) for spec in stored_specs(plan)}
    stored = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    names = announced.keys() | stored.keys()
    differ = sorted(name for name in names if announced.get(name) != stored.get(name))
    if differ:
        expected, got = (_shown(forms.get(differ[0])) for forms in (announced, stored))
        _malformed(file, f"must be {expected}, as the plan announces; got {got}", differ[0])


def _shown(form: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if form is None else f"{form[0]} {list(form[1])}"
