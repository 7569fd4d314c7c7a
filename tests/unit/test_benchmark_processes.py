"""`make bench ARGS="--against REV"`: processes, neighbours, checkouts and tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import against, checkouts, rows
from benchmarks.checkouts import NoCheckout, checkout, resolve
from benchmarks.gpu.__main__ import run_part
from benchmarks.gpu.results import BEGIN, END, README, Results, update_readme
from benchmarks.processes import NEIGHBOURS, CommandFailed, Measured, neighbour, run, stages_of
from benchmarks.rows import Row, Side

ROOT = Path(__file__).parents[2]
GIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def git(folder, *words):
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, env={**os.environ, **GIT})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "src" / "e4t_cli").mkdir(parents=True)
    (folder / "src" / "e4t_cli" / "__init__.py").write_text("")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "one")
    return folder


def test_a_checkout_is_there_and_then_gone(repository):
    with checkout(resolve("HEAD", repository), repository) as folder:
        assert (folder / "src" / "e4t_cli" / "__init__.py").exists()
    assert not folder.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_checkout_is_gone_after_a_signal(repository, number):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom benchmarks.checkouts import checkout\n"
        "from benchmarks.processes import ended_by_signals\nroot = Path(sys.argv[1])\n"
        "with ended_by_signals(), checkout('HEAD', root) as folder:\n    print(folder, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(repository)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    folder = Path(process.stdout.readline().strip())
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0 and not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("revision", ["nothing", "-x", "HEAD:src", ""])
def test_no_such_commit(repository, revision):
    with pytest.raises(NoCheckout, match="there is no commit"):
        resolve(revision, repository)


def test_no_checkout(repository):
    with pytest.raises(NoCheckout, match="no git checkout"):
        resolve("HEAD", repository / "src")


def test_a_commit_without_the_package(repository):
    git(repository, "rm", "-qr", "src")
    git(repository, "commit", "-qm", "two")
    with pytest.raises(NoCheckout, match="no src/e4t_cli"):
        resolve("HEAD", repository)


def test_what_a_process_took(tmp_path):
    code = (
        "import sys, time; x = bytearray(80 << 20); t = time.process_time()\nwhile time.process_time() < t + 0.2: pass"
    )
    told = "\nprint('out'); print('seed 7; 3.5 s: imports 1.5, tune 2.0', file=sys.stderr)"
    found = run([sys.executable, "-c", code + told], os.environ, tmp_path)
    assert found.wall >= found.cpu * 0.5 and 0.2 <= found.cpu < 5
    assert found.memory > 80 << 20  # at least: Linux counts what the process that starts another one held
    assert found.stages == {"imports": 1.5, "tune": 2.0} and found.output == "out\n"


def test_a_command_that_fails_says_why(tmp_path):
    code = "import sys; print('error: no such file', file=sys.stderr); print('then: x', file=sys.stderr); sys.exit(3)"
    with pytest.raises(CommandFailed, match="exit code 3: error: no such file"):
        run([sys.executable, "-c", code], os.environ, tmp_path)


def test_stages_are_those_of_the_last_line():
    assert stages_of("seed 1; 2.0 s: load 1.0\ntune 9.0\nseed 1; 2.0 s: tune 2.5\n") == {"tune": 2.5}
    assert stages_of("loading 3.0") == {}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_a_neighbour_works_and_ends(kind):
    before = sum(os.times()[2:4])
    with neighbour(kind):
        pass
    assert sum(os.times()[2:4]) > before  # how much, a busy machine decides


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_a_neighbour_ends_with_a_program_that_was_killed(kind):
    program = "import sys\nfrom benchmarks.processes import start_neighbour\nprint(start_neighbour(sys.argv[1]).pid)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, kind], stdout=subprocess.PIPE, text=True, env=environment)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it runs on")


def sides(tmp_path):
    return tuple(Side(name=name, root=ROOT, work=tmp_path / name, newer=name == "new") for name in ("old", "new"))


def test_pairs_alternate_and_ratios_are_of_the_newer(tmp_path, monkeypatch):
    order = []

    def measure(side):
        order.append(side.name)
        return Measured(wall=2.0 if side.newer else 4.0, cpu=3.0)

    monkeypatch.setitem(rows.ROWS, "demo2", Row(title="a row", measure=measure))
    kept = []
    found = against.compare("demo2", sides(tmp_path), 3, lambda result: kept.append(len(result["pairs"])))
    assert order == ["new", "old", "old", "new", "new", "old", "old", "new"] and kept == [1, 2, 3]
    assert "| a row, seconds | 4.00 | 2.00 | 0.50 (0.50 … 0.50) |" in against.table({"demo2": found}, ("old", "new"))


def test_a_row_that_fails_or_cannot_be_measured_is_in_the_table(tmp_path, monkeypatch):
    def fail(side):
        raise CommandFailed("exit code 8: error: no")

    monkeypatch.setitem(rows.ROWS, "bad", Row(title="bad", measure=fail))
    missing = Row(title="gone", measure=fail, skipped=lambda side: "no command" if side.newer else "")
    monkeypatch.setitem(rows.ROWS, "gone", missing)
    both = sides(tmp_path)
    found = {name: against.compare(name, both, 1, lambda result: None) for name in ("bad", "gone")}
    text = against.table(found, ("old", "new"))
    assert "failed: exit code 8: error: no" in text and "skipped: no command" in text


def test_bad_arguments_end_with_2(capsys):
    for words in (["--against", "x", "--rows", "nothing"], ["--against", "x", "--pairs", "0"], ["--against"]):
        with pytest.raises(SystemExit) as ended:
            against.main(words)
        assert ended.value.code == 2
    assert against.main(["--against", "no-such-commit"]) == 2
    assert "there is no commit" in capsys.readouterr().err or not (checkouts.ROOT / ".git").exists()


def test_a_part_that_takes_too_long_is_stopped_with_its_folder(tmp_path):
    from benchmarks.gpu.__main__ import parse

    log = tmp_path / "log.txt"
    given = parse(["--out", str(tmp_path), "--tiny", "--device", "cpu"])
    assert run_part("facts", given, 0.2, log).startswith("stopped after")


def test_results_survive_and_become_a_table(tmp_path):
    results = Results(tmp_path)
    assert results.table() == "Not measured."
    about = {
        "date": "2030-01-01", "card": "a card", "cores": 3, "torch": "1", "diffusers": "2", "transformers": "3",
        "python": "4", "model": "a model", "tflops": 5.0, "rehearsal": False,
    }  # fmt: skip
    for key, value in about.items():
        results.put("facts", key, value)
    results.times("tune full", [3.0, 1.0, 2.0])
    results.put("figures", "tune full, graphs differ", 0.0)
    results.note("draw", "stopped after 80 s", 80)
    text = Results(tmp_path).table()
    assert "2.00 s (1.00 … 3.00) | not measured |" in text and "equal in every bit" in text
    assert "Incomplete: draw: stopped after 80 s." in text
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(results, page)
    update_readme(results, page)
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert written.count("2030-01-01") == 1
    results.put("facts", "rehearsal", True)
    with pytest.raises(SystemExit, match="rehearsal"):
        update_readme(results, page)
    assert json.loads((tmp_path / "results.json").read_text())["figures"]["tune full"] == [3.0, 1.0, 2.0]


def test_the_page_has_a_place_for_the_table():
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)
