"""How many CPU threads a command takes, and how they wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e4t_cli import threads
from e4t_cli.threads import SHORTEST, VARIABLE, WAITING, Load, free_threads, set_threads, set_waiting, usable_cores


def machine(
    root: Path, busy: dict[int, tuple[int, int]], *, quota: str = "max 100000", version: int = 2, idle: int = 0
) -> Path:
    """Write /proc and /sys of a machine: hundredths of a second of normal and of niced processes on each core."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    ticks = os.sysconf("SC_CLK_TCK") // 100
    lines = [f"cpu{core} {user * ticks} {nice * ticks} 0 {idle} 0 0 0 0 0 0" for core, (user, nice) in busy.items()]
    total = "cpu  1 2 3 4 5 6 7 8 9 10"
    (root / "proc/stat").write_text("\n".join([total, *lines, "intr 5", "ctxt 6"]))
    if version == 2:
        mount, group = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", "0::/pod/app"
    else:
        mount, group = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct", "3:cpu,cpuacct:/pod/app"
    (root / "proc/self/mountinfo").write_text(mount + "\n")
    (root / "proc/self/cgroup").write_text(group + "\n")
    folder = root / ("sys/fs/cgroup/pod/app" if version == 2 else "sys/fs/cgroup/cpu/pod/app")
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(quota + "\n")
    else:
        for name, value in zip(("cpu.cfs_quota_us", "cpu.cfs_period_us"), quota.split() * 2, strict=False):
            (folder / name).write_text(value + "\n")
    return root


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("-1 100000", 4), ("800000 100000", 4), ("400000 100000", 4), ("250000 100000", 2),
     ("150000 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("0 0", 4), ("nonsense", 4)],
)  # fmt: skip
def test_a_quota_limits_the_cores(tmp_path: Path, four_cores: None, quota: str, expected: int, version: int) -> None:
    root = machine(tmp_path, {}, quota=quota, version=version)
    assert len(usable_cores(root)) == expected


def test_a_quota_of_a_group_above_counts(tmp_path: Path, four_cores: None) -> None:
    root = machine(tmp_path, {})
    (root / "sys/fs/cgroup/pod/cpu.max").write_text("200000 100000")
    assert len(usable_cores(root)) == 2


def test_only_cores_of_the_affinity_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5}, raising=False)
    assert usable_cores(machine(tmp_path, {})) == {2, 5}


def test_free_threads_never_exceed_the_free_cores() -> None:
    """By 0.35 of a core at most, at least one, and fewer with more load."""
    for cores in range(1, 65):
        found = [free_threads(cores, others / 20) for others in range(20 * cores + 40)]
        assert found[0] == cores and min(found) == 1 and found == sorted(found, reverse=True)
        assert all(n <= max(1.0, cores - k / 20 + 0.35 + 1e-9) for k, n in enumerate(found))


def readings(tmp_path: Path, before: dict, after: dict, seconds: float, own: float) -> tuple[Load, Load]:
    first = Load.read(machine(tmp_path, before))
    second = Load.read(machine(tmp_path, after))
    return Load(10.0, 1.0, first.busy), Load(10.0 + seconds, 1.0 + own, second.busy)


def test_what_others_use_is_counted_without_this_process_and_niced_ones(tmp_path: Path) -> None:
    before, after = {0: (100, 0), 1: (200, 0), 2: (0, 0)}, {0: (150, 0), 1: (240, 900), 2: (50, 0)}
    first, second = readings(tmp_path, before, after, seconds=0.5, own=0.4)
    assert first.others_until(second, {0, 1}) == pytest.approx((0.5 + 0.4 - 0.4) / 0.5)
    assert first.others_until(second, {0}) == pytest.approx(0.2)
    assert first.others_until(second, {7}) == 0.0


@pytest.mark.parametrize("seconds", [0.0, SHORTEST / 2])
def test_no_load_is_told_from_a_short_time(tmp_path: Path, seconds: float) -> None:
    first, second = readings(tmp_path, {0: (0, 0)}, {0: (100, 0)}, seconds=seconds, own=0.0)
    assert first.others_until(second, {0}) == 0.0


def test_a_system_without_counters_has_no_load(tmp_path: Path) -> None:
    load = Load.read(tmp_path / "nothing")
    assert load.busy == {} and load.others_until(Load(load.at + 1, load.own, {}), {0, 1}) == 0.0


@pytest.mark.parametrize(
    ("wanted", "given", "expected"), [(3, None, 3), (3, "2", 3), (0, "2", 2), (0, "nonsense", 0), (0, "", 0)]
)
def test_an_explicit_number_wins(
    tmp_path: Path, four_cores: None, wanted: int, given: str | None, expected: int
) -> None:
    environment = {} if given is None else {VARIABLE: given}
    assert set_threads(wanted, None, environment, machine(tmp_path, {})) == expected
    assert environment.get(VARIABLE) == (str(wanted) if wanted else given)


def test_a_busy_core_gets_no_thread(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = dict.fromkeys(range(4), (0, 0))
    since = Load.read(machine(tmp_path, idle))
    later = Load(since.at + 1.0, since.own, {0: 1.0, 1: 0.02, 2: 0.9, 3: 0.0})
    monkeypatch.setattr(threads.Load, "read", lambda root=None: later)
    environment: dict[str, str] = {}
    assert set_threads(0, since, environment, tmp_path) == 2 and environment == {VARIABLE: "2"}


def test_all_cores_free_leaves_the_number_to_the_libraries(tmp_path: Path, four_cores: None) -> None:
    environment: dict[str, str] = {}
    assert set_threads(0, None, environment, machine(tmp_path, {})) == 0 and environment == {}


def test_threads_wait_asleep_unless_the_user_says_how() -> None:
    environment: dict[str, str] = {}
    set_waiting(environment)
    assert environment == WAITING
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        mine = {name: "7"}
        set_waiting(mine)
        assert mine == {name: "7"}
