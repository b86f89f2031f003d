"""What a compiled kernel may use on the cards that are compiled for. Source: CUDA's tables."""

from typing import Any, NamedTuple


class Card(NamedTuple):
    """Limits of one compute capability.

    Attributes:
        shared: bytes of shared memory that one block can be given.
        registers: registers that one block can be given.
        warp_registers: a warp is given a multiple of so many.
    """

    shared: int
    registers: int = 65536
    warp_registers: int = 256


CARDS = {80: Card(163 * 1024), 90: Card(227 * 1024)}


def faults(line: dict[str, Any]) -> list[str]:
    """Why a compiled form must not be shipped; empty when nothing speaks against it.

    Args:
        line: what ``python -m tests.ops.aot`` prints for it.
    """
    if "error" in line:
        return [f"does not compile: {line['error']}"]
    card = CARDS[line["capability"]]
    found = []
    if line["stack"] or line["local"]:
        found.append(f"{line['stack'] + line['local']} bytes of registers spilled to local memory")
    if line["shared"] > card.shared:
        found.append(f"{line['shared']} bytes of shared memory, the card has {card.shared}")
    unit = card.warp_registers
    per_warp = -(-line["registers"] * 32 // unit) * unit
    if per_warp * line["warps"] > card.registers:
        found.append(f"{line['registers']} registers cannot launch {line['warps']} warps")
    return found
