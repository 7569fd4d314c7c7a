"""What can go wrong between a hub and a disk (D1 to D19), on real sockets with real files."""

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e4t_cli.errors import IntegrityError, ResourceError, WeightsUnavailable
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, hub_cache, user_cache
from tests.hub.fake_hub import Fault
from tests.hub.repositories import safetensors_of, write_files

WEIGHTS = "weights.safetensors"
ALL = ["config.json", "*.safetensors"]
OFFLINE = HubAccess(offline=True)


def blobs() -> list[Path]:
    return sorted(hub_cache().glob("models--owner--tiny/blobs/*"))


def intact(folder: Path) -> bool:
    return (folder / WEIGHTS).read_bytes() == safetensors_of(300_000)


def fetch_elsewhere(commit: str, before: str = "", **options) -> subprocess.Popen[str]:
    """Fetch in a process of its own."""
    code = f"""
{before}
from e4t_cli.hub.download import fetch_files
from e4t_cli.errors import E4TError
try:
    print(fetch_files("owner/tiny", {commit!r}, {ALL!r}))
except E4TError as error:
    raise SystemExit(error.exit_code)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def test_a_plain_fetch(hub, repository):
    events = []
    folder = fetch_files("owner/tiny", repository, ALL, HubAccess(on_progress=events.append))
    assert folder.name == repository and intact(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    assert not hub.count("GET", "*.py")
    remarks = [event.remark for event in events if event.remark]
    assert len(remarks) == 1 and "300 kB" in remarks[0] and "free there" in remarks[0]
    last = [event for event in events if event.stage == "fetch" and event.total][-1]
    assert last.done == last.total > 300_000 and last.unit == "bytes"
    requests_before = len(hub.requests)
    assert fetch_files("owner/tiny", repository, ALL) == folder
    assert len(hub.requests) == requests_before, "what is here needs no question"


@pytest.mark.parametrize("reporter", [True, False])
def test_bytes_are_counted_once_however_they_are_sent(reporter):
    """Xet reports every byte twice: from the network, and on the disk."""
    from types import SimpleNamespace

    from e4t_cli.hub.download import ProgressMeter

    events = []
    meter = ProgressMeter(1_000_000, events.append)
    bar = meter.bar_class()
    if reporter:
        module = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
        with module.XetDownloadProgressReporter(
            reconstruction_desc="", total=1_000_000, log_level=30, name="x", tqdm_class=bar
        ) as progress:
            for done in (300_000, 600_000):
                progress.update_progress(
                    SimpleNamespace(
                        total_bytes_completed=done, total_transfer_bytes_completed=done,
                        total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=1.0,
                        total_bytes=1_000_000,
                    )
                )  # fmt: skip
    else:
        with bar(total=1_000_000, unit="B", desc="weights") as progress:
            progress.update(600_000)
            progress.update_transfer(600_000)
    meter._report(1e9)
    assert (events[-1].done, events[-1].total) == (600_000, 1_000_000)


@pytest.mark.parametrize("kind", ["drop", "short"])
def test_D1_a_dropped_connection_is_tried_again(hub, repository, kind):
    hub.faults.append(Fault(kind, "*/weights.safetensors", times=2, method="GET"))
    assert intact(fetch_files("owner/tiny", repository, ALL))
    assert hub.count("GET", "*/weights.safetensors") == 3


@pytest.mark.parametrize("kind", ["drop", "short"])
def test_D2_D3_a_connection_that_always_breaks(hub, repository, kind):
    hub.faults.append(Fault(kind, "*/weights.safetensors", method="GET"))
    with pytest.raises(WeightsUnavailable, match="connection broke") as caught:
        fetch_files("owner/tiny", repository, ALL)
    assert not (hub_cache() / "models--owner--tiny/snapshots" / repository / WEIGHTS).exists()
    assert not list(hub_cache().rglob("*.incomplete"))
    assert caught.value.exit_code == 4 and "goes on" in caught.value.hint
    hub.faults.clear()
    assert intact(fetch_files("owner/tiny", repository, ALL))


def test_D4_wrong_bytes_of_the_right_length_once(hub, repository):
    hub.faults.append(Fault("corrupt", "*/weights.safetensors", times=1, method="GET"))
    notes = []
    folder = fetch_files(
        "owner/tiny",
        repository,
        ALL,
        HubAccess(on_progress=lambda event: notes.append(event.note)),
    )
    assert intact(folder) and hub.count("GET", "*/weights.safetensors") == 2
    assert any("damaged: fetching it again" in note for note in notes)


def test_D4_wrong_bytes_of_the_right_length_always(hub, repository):
    hub.faults.append(Fault("corrupt", "*/weights.safetensors", method="GET"))
    with pytest.raises(IntegrityError) as caught:
        fetch_files("owner/tiny", repository, ALL)
    expected = hashlib.sha256(safetensors_of(300_000)).hexdigest()
    assert expected in caught.value.message and "got" in caught.value.message
    assert hub.count("GET", "*/weights.safetensors") == 2, "once more, and no more"
    assert expected not in [path.name for path in blobs()], "nothing wrong stays"


def test_D5_a_blob_that_changes_later(hub, repository):
    folder = fetch_files("owner/tiny", repository, ALL)
    blob = (folder / WEIGHTS).resolve()
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(blob, (1, 1))
    with pytest.raises(IntegrityError) as caught:
        fetch_files("owner/tiny", repository, ALL)
    assert caught.value.hint == f"fetch it again: e4t fetch owner/tiny@{repository}"
    assert intact(fetch_files("owner/tiny", repository, ALL, repair=True))


def test_D6_a_sign_in_page_in_place_of_the_weights(hub, repository):
    hub.faults.append(Fault("portal", "*/resolve/*", method="GET"))
    with pytest.raises(IntegrityError, match="is not that file") as caught:
        fetch_files("owner/tiny", repository, ALL)
    assert "sign-in page" in caught.value.hint


@pytest.mark.parametrize("path", ["*", "*/resolve/*"])
def test_D6_a_sign_in_page_in_place_of_the_hub(hub, repository, path):
    hub.faults.append(Fault("portal", path))
    with pytest.raises(WeightsUnavailable, match="is not the hub"):
        fetch_files("owner/tiny", repository, ALL)


@pytest.mark.parametrize("locks", [True, False])
def test_D7_D8_two_processes_at_once(hub, repository, locks):
    import threading

    # Both have begun before either is done.
    hub.chunk_gate = threading.Event()
    broken = "import fcntl; fcntl.flock = lambda *_: None"
    both = [fetch_elsewhere(repository, "" if locks else broken) for _ in range(2)]
    assert hub.started_body.wait(30)
    deadline = time.monotonic() + 30
    while hub.count("GET", "/api/*") < 2 and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    hub.chunk_gate.set()
    ended = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    if locks:
        assert hub.count("GET", "*/weights.safetensors") == 1
    assert intact(Path(ended[0][0].strip()))


def test_D9_a_full_disk_is_reported_before_anything_is_fetched(hub, repository, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 50_000))
    with pytest.raises(ResourceError, match="needs 300 kB and 50 kB are free") as caught:
        fetch_files("owner/tiny", repository, ALL)
    assert caught.value.exit_code == 6 and not hub.count("GET", "*/resolve/*")


def test_D9_a_disk_that_fills_up_half_way(hub, repository, monkeypatch):
    from huggingface_hub import file_download

    def fill(url, file, **_):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))

    with monkeypatch.context() as full:
        full.setattr(file_download, "http_get", fill)
        with pytest.raises(ResourceError, match="disk is full"):
            fetch_files("owner/tiny", repository, ALL)
    assert not list(hub_cache().rglob("*.incomplete"))
    assert intact(fetch_files("owner/tiny", repository, ALL))


def test_D10_killed_half_way(hub, repository):
    import threading

    from e4t_cli.hub.cache import prune

    hub.chunk_gate = threading.Event()
    process = fetch_elsewhere(repository)
    assert hub.started_body.wait(30)
    deadline = time.monotonic() + 10
    while not list(hub_cache().rglob("*.incomplete")) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    hub.chunk_gate.set()
    orphans = list(hub_cache().rglob("*.incomplete"))
    assert orphans
    assert intact(fetch_files("owner/tiny", repository, ALL))
    for path in orphans:
        os.utime(path, (1, 1))  # prune leaves alone what may still be written to
    removed = prune()
    assert {one.path for one in removed} >= set(orphans)
    assert not list(hub_cache().rglob("*.incomplete"))


def test_D12_a_cache_that_cannot_be_written_to(hub, repository, tmp_path, monkeypatch):
    folder = fetch_files("owner/tiny", repository, ALL)
    make, write = os.mkdir, os.open

    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            refuse(path)
        return write(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "open", read_only)
    for note in (user_cache() / "verified").glob("*"):
        note.unlink()  # even what was verified elsewhere
    assert fetch_files("owner/tiny", repository, ALL) == folder
    hub.add("owner/other", tmp_path / "tiny")
    with pytest.raises(WeightsUnavailable, match="cannot be written to") as caught:
        fetch_files("owner/other", repository, ALL)
    assert "HF_HOME" in caught.value.hint and "E4T_CACHE_DIR" in caught.value.hint
    assert make is not os.mkdir


@pytest.mark.parametrize("how", ["argument", "E4T_OFFLINE", "HF_HUB_OFFLINE"])
def test_D13_offline_opens_no_socket(hub, repository, monkeypatch, how):
    folder = fetch_files("owner/tiny", repository, ALL)
    if how != "argument":
        monkeypatch.setenv(how, "1")

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    access = HubAccess(offline=how == "argument")
    assert fetch_files("owner/tiny", repository, ALL, access) == folder
    for pattern in ("*.safetensors", WEIGHTS, "absent.json"):
        begun = time.perf_counter()
        with pytest.raises(WeightsUnavailable, match="offline") as caught:
            fetch_files("owner/none", repository, [pattern], access)
        assert time.perf_counter() - begun < 2 and "e4t fetch owner/none" in caught.value.hint


def test_D14_offline_and_incomplete_reports_what_is_missing(hub, repository):
    folder = fetch_files("owner/tiny", repository, ALL)
    (folder / WEIGHTS).unlink()
    with pytest.raises(WeightsUnavailable, match=f"offline: {WEIGHTS}"):
        fetch_files("owner/tiny", repository, ALL, OFFLINE)
    for note in (user_cache() / "hub").rglob("*.json"):
        note.unlink()  # fetched by another program, say
    with pytest.raises(WeightsUnavailable, match=f"offline: {WEIGHTS}"):
        fetch_files("owner/tiny", repository, ["config.json", WEIGHTS], OFFLINE)


def test_D15_a_hanging_network_does_not_matter_to_what_is_here(hub, repository, monkeypatch):
    folder = fetch_files("owner/tiny", repository, ALL)
    hub.faults.append(Fault("hang"))
    requests_before = len(hub.requests)
    begun = time.perf_counter()
    assert fetch_files("owner/tiny", repository, ALL) == folder
    assert fetch_files("owner/tiny", repository, ["config.json"]) == folder
    assert time.perf_counter() - begun < 1 and len(hub.requests) == requests_before


STATUSES = {
    401: ("refused the token", {"X-Error-Message": "Invalid credentials in Authorization header"}),
    403: ("does not give", {}),
    404: ("there is no repository", {"X-Error-Code": "RepoNotFound"}),
    429: ("too many requests", {"Retry-After": "600"}),
    500: ("is in trouble", {}),
    503: ("is in trouble", {}),
}


@pytest.mark.parametrize("where", ["/api/*", "*/resolve/*"])
@pytest.mark.parametrize("status", STATUSES)
def test_D16_refusals_of_the_hub(hub, repository, monkeypatch, status, where):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    sentence, headers = STATUSES[status]
    if status == 429 and where != "/api/*":
        headers = {"Retry-After": "0"}  # huggingface_hub waits as long as the header states
    hub.faults.append(Fault("status", where, status=status, headers=headers))
    with pytest.raises(WeightsUnavailable, match=sentence) as caught:
        fetch_files("owner/tiny", repository, ALL)
    message = f"{caught.value.message} {caught.value.hint}"
    assert "hf_good" not in message and "127.0.0.1" not in caught.value.message
    if status == 429 and where == "/api/*":
        assert "wait 600 seconds" in message and hub.count("GET", "/api/*") == 1
    if status >= 500 and where == "/api/*":
        assert hub.count("GET", "/api/*") == 3


def test_D16_a_short_wait_is_waited(hub, repository):
    hub.faults.append(Fault("status", "/api/*", 1, 429, {"Retry-After": "1"}))
    remarks = []
    folder = fetch_files(
        "owner/tiny",
        repository,
        ALL,
        HubAccess(on_progress=lambda event: remarks.append(event.remark)),
    )
    assert intact(folder) and any("trying again in 1 s" in remark for remark in remarks)


def test_D16_gated(hub, tmp_path):
    folder = write_files(tmp_path / "gated", config_json=b"{}")
    commit = hub.add("owner/gated", folder, gated=True)
    with pytest.raises(WeightsUnavailable, match="accepted its terms") as caught:
        fetch_files("owner/gated", commit, ["config.json"])
    assert caught.value.hint == f"accept them at {hub.url}/owner/gated, then: hf auth login"


def test_D16_missing_revision_and_missing_file(hub, repository):
    with pytest.raises(WeightsUnavailable, match="no revision 'v9'"):
        fetch_files("owner/tiny", "v9", ALL)
    with pytest.raises(WeightsUnavailable, match="no file 'encoder.pt'"):
        fetch_files("owner/tiny", repository, ["encoder.pt"])
    for name in ("../..", "owner", "owner/a/b", "a--b/c", "owner/.."):
        with pytest.raises(WeightsUnavailable, match="cannot be a repository"):
            fetch_files(name, None, ALL)


def test_D16_no_network_at_all(hub, repository, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(WeightsUnavailable, match="cannot be reached"):
        fetch_files("owner/tiny", repository, ALL)


def test_D17_a_branch_stays_where_it_was_found(hub, repository, tmp_path):
    first = fetch_files("owner/tiny", None, ALL)
    newer = write_files(tmp_path / "tiny", weights_safetensors=safetensors_of(300_000, seed=1))
    assert hub.add("owner/tiny", newer) != repository
    assert fetch_files("owner/tiny", None, ALL) == first == fetch_files("owner/tiny", "main", ALL)

    from e4t_cli.hub.repo_info import forget_repository

    forget_repository("owner/tiny")
    assert fetch_files("owner/tiny", None, ALL) != first


def test_D18_a_cache_behind_a_link(hub, repository, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a link"))
    folder = fetch_files("owner/tiny", repository, ALL)
    assert intact(folder) and folder == fetch_files("owner/tiny", repository, ALL, OFFLINE)


def test_D19_a_token_that_the_hub_does_not_know(hub, repository, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired_secret")
    notes = []
    folder = fetch_files(
        "owner/tiny",
        repository,
        ALL,
        HubAccess(on_progress=lambda event: notes.append(event.note)),
    )
    assert intact(folder) and "Bearer hf_expired_secret" in hub.authorizations
    message = [note for note in notes if note]
    assert message and all("going on without it" in note for note in message)
    assert not any("hf_expired" in note for note in message)


def test_D19_a_good_token_is_used_and_never_kept(hub, repository, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch_files("owner/tiny", repository, ALL)
    assert set(hub.authorizations) == {"Bearer hf_good"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hf_good" not in path.read_bytes()


def test_a_damaged_inventory_is_requested_again(hub, repository):
    fetch_files("owner/tiny", repository, ALL)
    (note,) = (user_cache() / "hub").rglob("*.json")
    json.loads(note.read_text())
    note.write_text("{")
    assert intact(fetch_files("owner/tiny", repository, ALL))


def test_runs_in_two_threads_report_each_its_own_retries(hub, repository, tmp_path):
    """huggingface_hub logs to one logger for all threads; nothing stays attached to it."""
    import logging
    import threading

    other = hub.add("owner/other", tmp_path / "tiny")
    logged = []

    class Collect(logging.Handler):
        def emit(self, record):
            logged.append((threading.get_ident(), record.getMessage()))

    logger, collect = logging.getLogger("huggingface_hub"), Collect()
    logger.addHandler(collect)
    before = logger.handlers[:]
    hub.faults.append(Fault("short", "/owner/tiny/*/weights.safetensors", times=1, method="GET"))
    hub.chunk_gate = threading.Event()
    events = {"owner/tiny": [], "owner/other": []}
    threads = [
        threading.Thread(
            target=fetch_files,
            args=(name, commit, ALL, HubAccess(on_progress=events[name].append)),
        )
        for name, commit in (("owner/tiny", repository), ("owner/other", other))
    ]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            hub.count("GET", "/owner/tiny/*/weights.safetensors") < 2
            or hub.count("GET", "/owner/other/*/weights.safetensors") < 1
        ):
            threading.Event().wait(0.02)
        # Both run, and one has retried: a warning from another thread belongs to neither.
        logger.getChild("file_download").warning("Retrying in 1s")
        hub.chunk_gate.set()
        for thread in threads:
            thread.join(30)
    finally:
        logger.removeHandler(collect)
    assert not any(thread.is_alive() for thread in threads)
    retries = {
        name: [event.remark for event in found if "trying again" in event.remark] for name, found in events.items()
    }
    assert len(retries["owner/tiny"]) == 1 and not retries["owner/other"]
    assert logged == [(threading.get_ident(), "Retrying in 1s")]
    assert [*logger.handlers, collect] == before
    assert not any(handler.filters for handler in before)
    for name, found in events.items():
        sizes = {event.total for event in found if event.stage == "fetch" and event.total}
        assert len(sizes) == 1, f"{name} got the progress of another run"
