"""``tailor-fast backends``: which implementations run here, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from tailor_fast.cli.options import Options


@dataclass(frozen=True, kw_only=True)
class BackendsOptions(Options):
    """None of its own."""


def backends(options: BackendsOptions) -> None:  # noqa: ARG001  every command takes its options
    """Show each op's backends per device, the preferred one first, and why one cannot run."""
    from tailor_fast import ops
    from tailor_fast.cli.tables import show, table

    rows = [
        (op, device, backend, reason or "available")
        for op, devices in ops.backends().items()
        for device, states in devices.items()
        for backend, reason in states.items()
    ]
    show(table(("op", "device", "backend", "state"), rows))
