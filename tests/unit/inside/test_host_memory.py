"""What the machine can still give, from files as the kernel writes them."""

import os
from pathlib import Path

from kvpilot.inside.host_memory import HostMemory

MIB = 1 << 20
MEMINFO = "MemTotal:       24684084 kB\nMemFree:        1000 kB\nMemAvailable:   {kib} kB\nBuffers: 5 kB\n"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(root: Path, available_mib: int, groups: str = "0::/\n") -> Path:
    write(root, proc__meminfo=MEMINFO.format(kib=available_mib * 1024), proc__self__cgroup=groups)
    return root


def v2(root: Path, folder: str, limit: str, used_mib: int, inactive_mib: int = 0) -> None:
    group = root / "sys/fs/cgroup" / folder
    stat = f"anon 1\nfile 2\ninactive_file {inactive_mib * MIB}\nactive_file 9\n"
    write(group, memoryDOTmax=f"{limit}\n", memoryDOTcurrent=f"{used_mib * MIB}\n", memoryDOTstat=stat)


def available_mib(root: Path) -> float | None:
    host = HostMemory(root)
    found = host.available_bytes()
    host.close()
    return None if found is None else found / MIB


def test_without_limits_the_machine_says_it(tmp_path: Path) -> None:
    assert available_mib(machine(tmp_path, 700)) == 700


def test_a_limit_less_what_is_used_and_not_reclaimable(tmp_path: Path) -> None:
    machine(tmp_path, 700)
    v2(tmp_path, ".", str(512 * MIB), 500, inactive_mib=40)
    assert available_mib(tmp_path) == 52


def test_the_least_of_machine_and_every_limit_around(tmp_path: Path) -> None:
    machine(tmp_path, 700, groups="0::/pod/engine\n")
    v2(tmp_path, "pod", str(300 * MIB), 290)
    v2(tmp_path, "pod/engine", "max", 5)
    assert available_mib(tmp_path) == 10


def test_what_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    machine(tmp_path, 700)
    v2(tmp_path, ".", str(300 * MIB), 400)
    assert available_mib(tmp_path) == 0


def test_version_1_control_groups(tmp_path: Path) -> None:
    machine(tmp_path, 700, groups="3:cpuset:/\n4:memory:/job/1\n0::/\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    write(
        group,
        memoryDOTlimit_in_bytes=f"{100 * MIB}",
        memoryDOTusage_in_bytes=f"{90 * MIB}",
        memoryDOTstat=f"inactive_file 1\ntotal_inactive_file {5 * MIB}\n",
    )
    assert available_mib(tmp_path) == 15
    write(group, memoryDOTlimit_in_bytes="9223372036854771712")
    assert available_mib(tmp_path) == 700


def test_a_machine_that_says_nothing_is_none_and_not_zero(tmp_path: Path) -> None:
    assert HostMemory.open(tmp_path) is None
    machine(tmp_path, 0)
    host = HostMemory.open(tmp_path)
    assert host is not None
    assert host.available_bytes() == 0
    host.close()


def test_senseless_files_are_passed_over(tmp_path: Path) -> None:
    machine(tmp_path, 700, groups="nonsense\n0::/../..\n:::\n")
    v2(tmp_path, ".", "a lot", 1)
    assert available_mib(tmp_path) == 700


def test_it_is_read_anew_each_time_and_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    host = HostMemory.open(machine(tmp_path, 700))
    assert host is not None
    (tmp_path / "proc/meminfo").write_text(MEMINFO.format(kib=1024))
    assert host.available_bytes() == MIB
    host.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert host.available_bytes() is None


def test_this_machine_says_something() -> None:
    host = HostMemory.open()
    assert host is not None
    assert 0 < (host.available_bytes() or 0) < 1 << 50
    host.close()
