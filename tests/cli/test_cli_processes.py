"""What only a process of its own can show: signals, pipes, terminals, many at once."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

# The real command line around a personalization that only waits, so that a signal finds it in
# exactly one stage and no test loads torch to see what a signal does.
WAITING = """
import sys, time
from e4t_cli.api import personalization
from e4t_cli.cli import app
from e4t_cli.progress import Progress

def personalize(*arguments, on_progress, **options):
    on_progress(Progress(stage={stage!r}, done=1, total=2))
    for _ in range(600):
        time.sleep(0.05)

personalization.personalize = personalize
sys.argv = ["e4t", "personalize", "face", "me.png", "S* x", *{more!r}]
app.main()
"""


def python(code, tmp_path, **options):
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **{**settings, **options})


def read_until(stream, words, seconds=60):
    """Read a pipe or a terminal until some words came."""
    seen, end = b"", time.monotonic() + seconds
    while words.encode() not in seen:
        ready, _, _ = select.select([stream], [], [], end - time.monotonic())
        assert ready, f"waited {seconds} s for {words!r}: {seen!r}"
        more = os.read(stream.fileno() if hasattr(stream, "fileno") else stream, 65536)
        assert more, f"ended without {words!r}: {seen!r}"
        seen += more
    return seen.decode()


@pytest.mark.parametrize("stage", ["load", "prepare", "tune", "generate"])
def test_an_interrupt_ends_any_stage(tmp_path, stage):
    process = python(WAITING.format(stage=stage, more=[]), tmp_path)
    read_until(process.stderr, stage)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert out == ""


def test_a_termination_says_so(tmp_path):
    process = python(WAITING.format(stage="tune", more=[]), tmp_path)
    read_until(process.stderr, "tune")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert err.endswith("terminated\n")


STUBBORN = """
import time
from e4t_cli.cli import domains

def list_domains(**options):
    while True:
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("not now", flush=True)

domains.list_domains = list_domains
from e4t_cli.cli import app
app.run(["domains"])
"""


def test_the_second_interrupt_does_not_ask(tmp_path):
    process = python(STUBBORN, tmp_path)
    read_until(process.stdout, "begun")
    process.send_signal(signal.SIGINT)
    read_until(process.stdout, "not now")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """`e4t … &` in a script: the shell asked that Ctrl-C should not reach it."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = python(code + WAITING.format(stage="tune", more=[]), tmp_path)
    read_until(process.stderr, "tune")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def on_a_terminal(code, tmp_path, *, words, **environment):
    """Run with stderr on a terminal and stdout in a pipe; interrupt it once `words` are there."""
    ours, theirs = pty.openpty()
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "FORCE_COLOR")}
    settings |= {"TERM": "xterm-256color", **environment}
    process = python(code, tmp_path, stderr=theirs, env=settings)
    os.close(theirs)
    seen = read_until(ours, words)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    try:
        while more := os.read(ours, 65536):
            seen += more.decode()
    except OSError:  # the other side of the terminal is closed
        pass
    os.close(ours)
    return process.returncode, out, seen


def test_a_terminal_is_left_as_it_was(tmp_path):
    code, out, seen = on_a_terminal(WAITING.format(stage="tune", more=[]), tmp_path, words="tune")
    assert code == 130
    assert out == ""
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back
    assert "interrupted" in seen


def test_no_color_means_none(tmp_path):
    waiting = WAITING.format(stage="tune", more=[])
    _, _, seen = on_a_terminal(waiting, tmp_path, words="tune", NO_COLOR="1")
    assert "\x1b[3" not in seen and "\x1b[1;3" not in seen


def test_a_dumb_terminal_gets_lines(tmp_path):
    waiting = WAITING.format(stage="tune", more=[])
    _, _, seen = on_a_terminal(waiting, tmp_path, words="tune", TERM="dumb")
    assert "\x1b" not in seen


SAVED_WHILE_LIVE = """
import time
from e4t_cli.cli.console import Console
from e4t_cli.progress import Progress

console = Console()
with console.progress() as on_progress:
    on_progress(Progress(stage="generate", done=1, total=2))
    console.product("outputs/[a].png", {})
    on_progress(Progress(stage="generate", note="it is saved"))
    time.sleep(60)
"""


def test_a_path_goes_to_the_pipe_whatever_the_terminal_shows(tmp_path):
    _, out, seen = on_a_terminal(SAVED_WHILE_LIVE, tmp_path, words="it is saved")
    assert out == "outputs/[a].png\n"
    assert "outputs" not in seen


def test_a_reader_that_leaves_is_no_fault(start):
    read, write = os.pipe()
    os.close(read)
    process = start("domains", "list", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 141  # 128 + SIGPIPE, as the signal would end other tools
    assert err == ""


def test_closed_streams_are_no_fault(tmp_path):
    for redirection in ("<&-", "2>&-", ">&-", "<&- >&- 2>&-"):
        command = f'exec "{sys.executable}" -m e4t_cli domains list {redirection}'
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["face", "-", "S* x"], "standard input, which is closed"),
        (["face", "me.jpg", "-"], "stdin is closed"),
        (["face", "me.jpg", "-f", "-"], "stdin is closed"),
    ],
)
def test_a_closed_stdin_is_one_sentence(start, arguments, words):
    process = start("personalize", *arguments, preexec_fn=lambda: os.close(0))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and words in err
    assert "unexpected" not in err


@pytest.mark.parametrize("arguments", [["domains", "list"], ["domains", "list", "--json"], ["--help"], ["--version"]])
def test_a_full_device_is_said_once(start, arguments):
    with open("/dev/full", "w") as full:
        process = start(*arguments, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 6
    assert err.count("error") == 1 and len(err.splitlines()) <= 2
    assert "Traceback" not in err and "Exception ignored" not in err


NOBODY = "import pwd\n\ndef nobody(*_):\n    raise KeyError\n\npwd.getpwuid = pwd.getpwnam = nobody\n"


@pytest.fixture
def homeless(start, tmp_path, monkeypatch):
    """Start a command as in a container: no HOME, and no entry in the password file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOBODY)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "E4T_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        process = start(*arguments, env={"PYTHONPATH": path})
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["domains", "list"], 0, ""),
        (["cache", "ls"], 0, "there is no home folder"),
        (["cache", "prune", "-y"], 0, ""),
        (["fetch", "sd14", "--offline"], 4, "not on this machine"),
        (["domains", "add", "{pack}"], 2, "HOME-is-not-set"),
    ],
)
def test_no_home_is_no_fault(homeless, world, tmp_path, arguments, code, words):
    before = sorted(tmp_path.iterdir())
    ended, out, err = homeless(*[one.format(pack=world.pack) for one in arguments])
    assert ended == code, err
    assert words in err and "unexpected" not in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before  # no folder called "~"
    if arguments == ["domains", "list"]:
        assert "face" in out


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "LC_ALL": "C", "TERM": ""},
        {"HOME": "/nonexistent", "XDG_DATA_HOME": ""},
        {"NO_COLOR": "1", "FORCE_COLOR": ""},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONWARNINGS": "error"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"CI": "true"},
    ],
    ids=str,
)
def test_odd_surroundings_are_no_fault(start, environment):
    process = start("domains", "list", "--json", env=environment)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert err == ""
    assert {"face", "cat", "art"} <= {json.loads(line)["name"] for line in out.splitlines()}


def test_a_path_that_is_no_text_comes_out_as_it_is(tmp_path):
    code = "import os; from e4t_cli.cli.console import write_stdout as w; w(os.fsdecode(b'\\xe9'))"
    settings = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True)
    assert done.stdout == b"\xe9\n"


SAVE_FIVE = """
import sys
from PIL import Image
from e4t_cli.images.png_metadata import GenerationRecord
from e4t_cli.images.results import GeneratedImage

record = GenerationRecord(
    prompt="S* x", seed=7, steps=1, guidance=1.0, scheduler="ddim", width=8, height=8,
    domain="face", versions={},
)
own = tuple(int(sys.argv[1]) for _ in range(3))
for _ in range(5):
    image = Image.new("RGB", (8, 8), own)
    print(GeneratedImage(image=image, prompt="S* x", seed=7, record=record).save("outputs"))
"""


def test_many_processes_share_a_folder(tmp_path):
    """Eight at once, the same seed and prompt: forty files, none of them lost or torn."""
    from PIL import Image

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_FIVE, str(index)],
            cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        )
        for index in range(8)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    paths = [path for own in told for path in own]
    assert len(set(paths)) == 40
    assert sorted(paths) == sorted(f"outputs/{p.name}" for p in (tmp_path / "outputs").iterdir())
    for index, own in enumerate(told):
        for path in own:
            with Image.open(tmp_path / path) as image:
                assert image.getpixel((0, 0)) == (index,) * 3


def test_a_whole_command_in_a_pipe(start, world, tmp_path):
    """No helper in between: module, signals, torch, files, stdout and stderr as users have them."""
    process = start(*world.personalize("--seed", "7", "--json"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert (tmp_path / told["path"]).is_file()
    assert err == ""


def test_an_interrupt_in_real_tuning_tears_nothing(start, world, tmp_path):
    arguments = world.personalize("--save", "me.e4t")
    arguments[arguments.index("--tune-steps") + 1] = "100000"
    process = start(*arguments)
    read_until(process.stderr, "tune 1/100000", seconds=120)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.endswith("interrupted\n")
    assert out == ""
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == []
