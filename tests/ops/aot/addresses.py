"""Products in the addresses of a compiled kernel that 32 bits may not hold.

A product of two sizes that only the launch knows passes 2^31 in a large tensor, and in a stream of
many; one of the two must be 64 bits wide before. Read from the compiler's first form of a kernel
(TTIR), in which all that it calls is inlined.
"""

import re
from collections.abc import Iterable

_DEFINED = re.compile(r"(%[\w.]+)(?::(\d+))? = (.*)")
_NAME = re.compile(r"%[\w.]+(?:#\d+)?")
_CARRIED = re.compile(r"(%[\w.]+) = (%[\w.]+(?:#\d+)?)")
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.extui")


class _Graph:
    """What each value of a kernel is made of (``sources``), and by which ``operations``."""

    def __init__(self, ttir: str) -> None:
        self.sources: dict[str, set[str]] = {}
        self.operations: dict[str, str] = {}
        regions: list[tuple[list[str], list[str]]] = []  # of loops and branches that are open
        for raw in ttir.splitlines():
            line = re.sub(r"\s*loc\(.*", "", raw).strip()
            defined = _DEFINED.match(line)
            results = [] if defined is None else _results(defined[1], defined[2])
            operation = line if defined is None else defined[3]
            if operation.startswith("scf.while"):
                raise ValueError("a loop without a number of steps is not read")
            if operation.startswith(("scf.for", "scf.if")):
                pairs = _CARRIED.findall(operation)
                for inner, first in pairs:
                    self._add([inner], [first])
                regions.append((results, [inner for inner, _ in pairs[1:]]))
            elif operation.startswith("scf.yield"):
                for targets in regions[-1]:
                    for target, value in zip(targets, _NAME.findall(operation), strict=False):
                        self._add([target], [value])
            elif re.match(r"\}(?!\)| else)", line) and regions:
                regions.pop()
            else:
                self._add(results, _NAME.findall(operation))
            self.operations |= dict.fromkeys(results, operation)

    def _add(self, results: Iterable[str], values: Iterable[str]) -> None:
        for result in results:
            self.sources.setdefault(result, set()).update(values)

    def constant(self, name: str) -> bool:
        """Whether a value is the same in every launch."""
        operation = self.operations.get(name, "")
        if operation.startswith(_SAME):
            return self.constant(_NAME.findall(operation)[0])
        return operation.startswith("arith.constant")

    def behind(self, name: str) -> set[str]:
        """All values that ``name`` is made of, up to what is loaded."""
        waiting, seen = [name], set[str]()
        while waiting:
            name = waiting.pop()
            if name not in seen and not self.operations.get(name, "").startswith("tt.load"):
                seen.add(name)
                waiting += self.sources.get(name, ())
        return seen


def narrow_products(ttir: str) -> list[str]:
    """The 32-bit products of two values that only a launch knows, of which addresses are made."""
    graph = _Graph(ttir)
    behind = set[str]()
    for operation in graph.operations.values():
        if operation.startswith("tt.addptr"):
            behind |= graph.behind(_NAME.findall(operation)[1])
    return [
        operation
        for name, operation in graph.operations.items()
        if name in behind
        and operation.startswith(("arith.muli", "arith.shli"))
        and re.search(r"\bi32>?$|xi32>$", operation)
        and not any(graph.constant(factor) for factor in _NAME.findall(operation))
    ]


def _results(name: str, count: str | None) -> list[str]:
    """``%a:2`` as other operations name its parts."""
    return [name] if count is None else [f"{name}#{at}" for at in range(int(count))]
