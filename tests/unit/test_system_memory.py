"""Free memory under every kind of limit, and the many ways in which libraries say that there was none."""

import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from e4t_cli import system_memory
from e4t_cli.cli import app
from e4t_cli.errors import IntegrityError, ResourceError
from e4t_cli.system_memory import GB, check_addresses, free_ram, memory_ran_out

V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
MOUNTS = {
    "v1": f"33 24 0:30 / {V1} rw,nosuid - cgroup cgroup rw,memory\n34 24 0:31 / /x rw - cgroup cgroup rw,cpu",
    "v2": f"30 24 0:26 / {V2} rw,nosuid shared:4 - cgroup2 cgroup2 rw",
    # A container that sees the host's names, but not the host's folders.
    "v1 inside": f"33 24 0:30 /docker/abc {V1} ro - cgroup cgroup rw,memory",
    "v2 inside": f"30 24 0:26 /docker/abc {V2} ro - cgroup2 cgroup rw",
    "both": f"33 24 0:30 / {V1} rw - cgroup cgroup rw,memory\n30 24 0:26 / {V2}/unified rw - cgroup2 cgroup2 rw",
}  # fmt: skip


def limit_v2(limit, used, cached=0, high="max"):
    stat = f"anon 5\ninactive_file {cached}\nactive_file 7\n"
    return {"memory.max": limit, "memory.current": used, "memory.high": high, "memory.stat": stat}


def limit_v1(limit, used, cached=0):
    stat = f"inactive_file 3\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


UNLIMITED = 9223372036854771712  # of version 1
CASES = {
    "none": ("v2", "0::/", {}, 16),
    "v2, the root": ("v2", "0::/", {"": limit_v2(4 * GB, GB)}, 3),
    "v2, its own group": ("v2", "0::/user/job", {"user/job": limit_v2(4 * GB, GB)}, 3),
    "v2, a group above": ("v2", "0::/user/job", {"user": limit_v2(2 * GB, GB), "user/job": limit_v2("max", GB)}, 1),
    "v2, the nearer": ("v2", "0::/user/job", {"user": limit_v2(9 * GB, GB), "user/job": limit_v2(3 * GB, GB)}, 2),
    "v2, slowed down": ("v2", "0::/a", {"a": limit_v2(9 * GB, GB, high=3 * GB)}, 2),
    "v2, cached files": ("v2", "0::/a", {"a": limit_v2(4 * GB, 3 * GB, cached=2 * GB)}, 3),
    "v2, more used than allowed": ("v2", "0::/a", {"a": limit_v2(GB, 2 * GB)}, 0),
    "v2, in a container": ("v2 inside", "0::/docker/abc", {"": limit_v2(4 * GB, GB)}, 3),
    "v2, a group in a container": ("v2 inside", "0::/docker/abc/x", {"x": limit_v2(2 * GB, GB)}, 1),
    "v2, a namespace of its own": ("v2", "0::/", {"": limit_v2(2 * GB, GB)}, 1),
    "v2, outside its namespace": ("v2", "0::/../other", {"": limit_v2(2 * GB, GB)}, 1),
    "v1": ("v1", "4:memory:/job\n1:cpu:/", {"job": limit_v1(4 * GB, GB)}, 3),
    "v1, unlimited": ("v1", "4:memory:/job", {"job": limit_v1(UNLIMITED, GB)}, 16),
    "v1, a group above": ("v1", "4:memory:/a/b", {"a": limit_v1(2 * GB, GB), "a/b": limit_v1(UNLIMITED, GB)}, 1),
    "v1, cached files": ("v1", "4:memory:/a", {"a": limit_v1(4 * GB, 3 * GB, cached=GB)}, 2),
    "v1, in a container": ("v1 inside", "9:memory:/docker/abc", {"": limit_v1(3 * GB, GB)}, 2),
    "v1 beside v2": ("both", "4:cpu,memory:/a\n0::/", {"a": limit_v1(4 * GB, GB)}, 3),
    "numbers that are none": ("v2", "0::/a", {"a": {"memory.max": "x", "memory.current": "y"}}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups(tmp_path, case, monkeypatch):
    monkeypatch.setattr(system_memory, "free_addresses", lambda root: None)
    mounts, groups, folders, gigabytes = CASES[case]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {16 << 20} kB\n")
    (tmp_path / "proc/self/mountinfo").write_text(f"22 1 0:20 / / rw - ext4 /dev/sda rw\n{MOUNTS[mounts]}\n")
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    top = tmp_path / (V1 if mounts.startswith("v1") or mounts == "both" else V2).lstrip("/")
    for name, files in folders.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (top / name / file).write_text(f"{content}\n")
    assert free_ram(tmp_path) == gigabytes * GB


def test_without_proc_there_is_a_number(tmp_path):
    assert free_ram(tmp_path) > 0
    assert free_ram() > 0


@pytest.mark.parametrize(("free", "passes"), [(None, True), (100 * GB, True), (GB, False)])
def test_too_few_addresses_are_refused_before_torch_is_loaded(monkeypatch, free, passes):
    monkeypatch.setattr(system_memory, "free_addresses", lambda: free)
    monkeypatch.delitem(sys.modules, "torch")
    if passes:
        return check_addresses()
    with pytest.raises(ResourceError, match="memory ran out: ulimit -v leaves 1.0 GB"):
        check_addresses()
    return None


def chained(error, *causes):
    for one, cause in zip((error, *causes), causes, strict=False):
        one.__cause__ = cause
    return error


ENOMEM = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
MEMORY = [
    MemoryError(),
    ENOMEM,
    SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError("libgomp.so.1: failed to map segment from shared object"),
    chained(RuntimeError("Failed to import diffusers"), ImportError("x.so: failed to map segment from shared object")),
    chained(IntegrityError("the base's unet cannot be loaded"), ENOMEM),
    chained(IntegrityError("not usable"), RuntimeError("again"), MemoryError()),
]
OTHERS = [
    None, OSError(errno.ENOENT, "No such file"), SafetensorError("Error while deserializing: HeaderTooLarge"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ImportError("No module named torch"),
    ValueError("a prompt about being out of memory"), IntegrityError("the base's unet lacks 2 weights"),
]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_memory_that_ran_out_is_recognised(error):
    assert memory_ran_out(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_others(error):
    assert not memory_ran_out(error)


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_every_command_ends_with_the_code_of_memory(monkeypatch, capsys, error):
    from e4t_cli.cli import domains

    def run_out(**options):
        raise error

    monkeypatch.setattr(domains, "list_domains", run_out)
    assert app.run(["domains"]) == 6
    err = capsys.readouterr().err
    assert err.startswith("error: memory ran out\n") and "bug" not in err


def test_the_base_is_not_blamed(monkeypatch, base_folder, tmp_path):
    """A file of weights for whose mapping there are no addresses is not a damaged one."""
    import safetensors.torch

    import e4t_cli
    from e4t_cli.models import loading
    from tests.conftest import drawn_face

    def run_out(path):
        raise SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)")

    monkeypatch.setattr(loading, "load_file", run_out)
    assert safetensors.torch.load_file is not run_out
    with pytest.raises(ResourceError, match="memory ran out"):
        e4t_cli.pretrain("my_dogs", [drawn_face(0, 64)[0]], base=base_folder, folder=tmp_path / "x", steps=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize("command", ["personalize", "info", "domains list", "domains check face", "doctor"])
@pytest.mark.parametrize("megabytes", [150, 300, 500, 800, 1200, 2000, 3000, 3700, 4000, 4300, 4500, 5000, 6000])
def test_a_limit_of_addresses_ends_with_the_code_of_memory(tmp_path, command, megabytes):
    """With the real limit, around what the libraries need: done, or code 6 and a sentence."""
    import resource

    from tests.conftest import drawn_face

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    drawn_face(1, 96)[0].save(tmp_path / "me.png")
    more = {
        "personalize": ["face", "me.png", "S* on the beach", "--steps", "2", "--tune-steps", "1"],
        "info": ["mini"],
    }  # fmt: skip
    arguments = [*command.split(), *more.get(command, [])]
    ended = subprocess.run(
        [sys.executable, "-m", "e4t_cli", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False,
    )  # fmt: skip
    print(command, megabytes, ended.returncode, ended.stderr[-200:])
    if ended.returncode == 0:
        return
    assert ended.returncode == 6, ended.stderr
    assert "error: memory ran out" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("*~"))
