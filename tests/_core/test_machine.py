"""What there is of memory, and what is refused because it is not there."""

from pathlib import Path

import pytest
import torch

from tailor_fast._core import machine
from tailor_fast._core.errors import UsageError

MIB = 1 << 20


def test_the_machine_s_own() -> None:
    free, total = machine.memory()
    assert 0 < free <= total


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> Path:
    (tmp_path / "groups").write_text(group)
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\nMemAvailable: 10240 kB\n")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_ROOT", tmp_path / "root")
    return tmp_path / "root"


def put(place: Path, **files: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("_", ".", 1)).write_text(text)


def test_the_tightest_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake(tmp_path, monkeypatch, "0::/a/b\n")
    stat = "anon 5\ninactive_file 1000\nactive_file 7\n"
    put(root / "a" / "b", memory_max="max\n", memory_current="1", memory_stat=stat)
    put(root / "a", memory_max=f"{8 * MIB}\n", memory_current=f"{3 * MIB}", memory_stat=stat)
    assert machine.memory() == (5 * MIB + 1000, 8 * MIB)
    (root / "a" / "memory.current").write_text(f"{9 * MIB}")  # more than all, for a moment
    assert machine.memory()[0] == 0


def test_version_1_and_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake(tmp_path, monkeypatch, "3:cpu:/x\n2:memory:/docker/1\n")
    assert machine.memory()[0] == 10 * MIB  # the group's folder is not there
    files = {"memory.limit_in_bytes": f"{4 * MIB}", "memory.usage_in_bytes": f"{MIB}"}
    (root / "memory").mkdir(parents=True)
    for name, text in (files | {"memory.stat": "total_cache 5\n"}).items():
        (root / "memory" / name).write_text(text)
    assert machine.memory() == (3 * MIB, 4 * MIB)


def test_what_is_refused_and_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (50, 100))
    assert machine.check_memory(50, 100) == []
    assert machine.check_memory(51, None) == [
        "takes 51 bytes of memory, of which 50 are free at the moment"
    ]
    with pytest.raises(UsageError, match="takes 101 bytes of memory, and there are 100; expected"):
        machine.check_memory(101, None)
    with pytest.raises(UsageError, match="max_ram of 101 bytes is more than the memory of 100"):
        machine.check_memory(1, 101)


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    gpu = torch.device("cuda:1")
    assert machine.check_device_memory(1000, torch.device("cpu")) == []
    assert machine.check_device_memory(50, gpu) == []
    told = machine.check_device_memory(100, gpu)
    assert told == ["takes 100 bytes of memory on cuda:1, of which 50 are free at the moment"]
    with pytest.raises(UsageError, match="takes 101 bytes of memory on cuda:1, which has 100"):
        machine.check_device_memory(101, gpu)
