"""What the commands answer before anything heavy is loaded: help, refusals, lists."""

import json
import os
import sys

import pytest

from e4t_cli.cli import console, terminal
from e4t_cli.errors import UsageError
from e4t_cli.registry import discovery

COMMANDS = [
    ["cache"],
    ["import"],
    ["personalize"],
    ["generate"],
    ["pretrain"],
    ["info"],
    ["domains"],
    ["domains", "list"],
    ["domains", "info"],
    *(["domains", name] for name in ("new", "add", "check", "rm", "push")),
]


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(run, command, option):
    ended = run(*command, option)
    assert ended.code == 0
    assert "Usage: e4t" in ended.out
    assert ended.err == ""
    assert "\x1b" not in ended.out


@pytest.mark.parametrize(("group", "word"), [([], "personalize"), (["cache"], "prune"), (["import"], "e4t-diffusion")])
def test_no_arguments_are_a_question(run, group, word):
    ended = run(*group)
    assert (ended.code, ended.err) == (0, "")
    assert word in ended.out and ended.out.rstrip() == run(*group, "--help").out.rstrip()


def test_version(run):
    from e4t_cli import __version__

    assert run("--version").out == f"e4t {__version__}\n"


def test_help_asks_for_consent_and_shows_examples(run):
    text = " ".join(run("personalize", "--help").out.split())
    assert "only with their consent" in text
    assert 'e4t personalize face me.jpg "S* as an astronaut"' in text


@pytest.mark.parametrize("columns", [60, 100])
def test_help_fills_its_lines(run, monkeypatch, columns):
    """A docstring's own breaks fit no terminal: a line ends where the next word is too long."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run("personalize", "--help").out
    paragraph = text.partition("Use photos of people")[2].partition("\n  ")[0]
    lines = [line.strip() for line in paragraph.splitlines()][1:]
    assert len(lines) > 2
    for line, below in zip(lines, lines[1:], strict=False):
        assert len(f" {line} {below.split()[0]} ") > columns


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["persnalize"], 2, "Did you mean 'personalize'"),
        (["personalize"], 2, "Missing argument"),
        (["personalize", "face", "p.png", "S* x", "-n", "0"], 2, "greater than or equal to 1"),
        (["personalize", "face", "p.png", "S* x", "--seed", "-1"], 2, "a whole number from 0"),
        (["personalize", "face", "p.png", "S* x", "--nonsense"], 2, "No such option"),
        (["personalize", "face", "p.png"], 2, "there is no prompt"),
        (["personalize", "face", "p.png", ""], 2, "the prompt is empty"),
        (["personalize", "face", "p.png", "a face"], 2, "does not name the concept, S*"),
        (["personalize", "face", "p.png", "S* x", "--placeholder", "<me>"], 2, "concept, <me>"),
        (["personalize", "face", "-", "-"], 2, "only one input can be - (stdin)"),
        (["personalize", "face", "p.png", "-", "-f", "-"], 2, "only one input can be - (stdin)"),
        (["personalize", "face", "p.png", "-f", "none.txt"], 2, "there is no file none.txt"),
        (["personalize", "fase", "p.png", "S* x"], 2, "did you mean 'face'?"),
        (["personalize", "face", "none.png", "S* x"], 2, "there is no file none.png"),
        (["personalize", "face", "https://x.org/me.jpg", "S* x"], 2, "curl"),
        (["personalize", "face", "notes.txt", "S* x"], 3, "not an image"),
        (["personalize", "face", "p.png", "S* x", "--base", "./none"], 2, "there is no folder"),
        (["personalize", "face", "p.png", "S* x", "--base", "sd14"], 4, "'sd14'"),
        (["personalize", "face", "p.png", "S* x", "--keep-weights"], 2, "--save"),
        (["personalize", "face", "p.png", "S* x", "--save", "p.png"], 2, "not overwritten"),
        (["personalize", "face", "p.png", "S* x", "-o", "p.png"], 2, "not overwritten"),
        (["personalize", "face", "p.png", "S* x", "-o", "notes.txt"], 2, "not a folder"),
        (["personalize", "face", "p.png", "S* x", "--mask", "none.png"], 2, "no file none.png"),
        (["personalize", "face", "p.png", "S* x", "--mask", "words:"], 2, "needs words"),
        (["personalize", "face", "p.png", "--save-prepared", "p.png"], 2, "not overwritten"),
        (["personalize", "face", "p.png", "S* x", "--save-prepared", "p.gif"], 2, "a PNG file"),
        (["personalize", "face", "p.png", "--save-prepared", "d", "--face", "0"], 2, "leftmost"),
        (["generate", "none.e4t", "S* x"], 2, "there is no file none.e4t"),
        (["generate", "p.png"], 2, "there is no prompt"),
        (["pretrain", "--domain", "../x", "--data", "."], 2, "domain name '../x'"),
        (["pretrain", "--domain", "my_dogs", "--data", "none"], 2, "there is no folder none"),
        (["pretrain", "--domain", "my_dogs"], 2, "Missing option"),
        (["domains", "info", "fase"], 2, "did you mean 'face'?"),
        (["info", "none.png"], 2, "there is no file none.png"),
        (["info", "p.png"], 3, "has no record of how it was made"),
    ],
)  # fmt: skip
def test_refusals(run, tmp_path, arguments, code, words):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    (tmp_path / "notes.txt").write_text("not a picture at all")
    ended = run(*arguments)
    assert ended.code == code, ended.err
    assert words in " ".join(ended.err.split())
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2  # a sentence, and what to type next
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").iterdir())


def test_a_forgotten_domain(run, tmp_path):
    (tmp_path / "me.jpg").touch()
    (tmp_path / "face").touch()  # a file with a domain's name changes nothing
    ended = run("personalize", "me.jpg", "S* x")
    assert ended.code == 2 and "the domain comes before it" in ended.err and "personalize face me.jpg" in ended.err
    assert "there is no prompt" in run("personalize", "face", "me.jpg").err


@pytest.mark.parametrize("command", ["generate", "export"])
@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.png", None, 3, "a.png is no concept, its type is 'prepared'"),
        ("a.jpg", b"\xff\xd8\xff", 3, "a.jpg is a JPEG picture, and is no concept"),
        ("a.e4t", b"", 3, "a.e4t is empty"),
        ("a.e4t", b"\xff" * 20, 5, "a.e4t is damaged"),
    ],
)
def test_files_that_are_no_concept(run, tmp_path, monkeypatch, command, name, content, code, words):
    """They are named before torch is imported."""
    from PIL import Image

    from e4t_cli.images.png_metadata import png_bytes

    monkeypatch.setitem(sys.modules, "e4t_cli.formats.concept", None)  # its import would fail
    (tmp_path / name).write_bytes(png_bytes(Image.new("RGB", (8, 8)), None) if content is None else content)
    ended = run(command, name, "S* x")
    assert (ended.code, ended.out) == (code, "") and words in ended.err
    assert code == 5 or "e4t personalize … --save" in ended.err


def test_json_refusals_are_json_on_stderr(run):
    for arguments in (["personalize", "face", "none.png", "hi"], ["personalize", "--nonsense"]):
        ended = run(*arguments, "--json")
        told = json.loads(ended.err)["error"]
        assert ended.code == told["exit"] == 2
        assert told["code"] == "usage"
        assert told["message"] and told["hint"]
        assert ended.out == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["S*", "as", "an", "astronaut"], 'quote the prompt: "S* as an astronaut"'),
        (["Setup.py", "Songs", "as", "an", "astronaut"], "--placeholder '<me>'"),
    ],
)
def test_a_prompt_without_quotes(run, tmp_path, words, hint):
    (tmp_path / "Setup.py").touch()
    ended = run("personalize", "face", "me.jpg", *words)
    assert ended.code == 2
    assert hint in ended.err


def test_prompts_from_everywhere_keep_their_order(tmp_path, monkeypatch):
    import io
    import sys

    from e4t_cli.cli.prompt_files import gather_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffS* on a hill\r\n\r\n  S* at sea  \n".encode())
    found = gather_prompts(["S* first"], str(file), placeholder="S*")
    assert [one.prompt for one in found] == ["S* first", "S* on a hill", "S* at sea"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"S* one\nS* two\n")))
    assert [one.prompt for one in gather_prompts(["-"], None, placeholder="S*")] == ["S* one", "S* two"]


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe\x00S", "not UTF-8"), (b"\n \n", "no prompts")])
def test_prompt_files_that_are_none(run, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    ended = run("personalize", "face", "me.jpg", "-f", "prompts.txt")
    assert ended.code == 3
    assert words in ended.err


def test_control_characters_are_shown_not_obeyed(run):
    ended = run("personalize", "face", "me.jpg", "[bold]evil\x1b[31m\x07")
    assert ended.code == 2
    assert "\x1b" not in ended.err and "\x07" not in ended.err
    ended = run("personalize", "face", "me.jpg", "[bold]plain[/bold]")
    assert "[bold]plain[/bold]" in ended.err


# ── domains ──


def test_domains_list(run):
    ended = run("domains", "list")
    assert ended.code == 0
    heading, *rows = ended.lines
    assert heading.split() == ["name", "source", "descriptor", "tuning", "weights", "licence"]
    face = next(row for row in rows if row.startswith("face"))
    assert "e4t " in face and "15 steps" in face and "Apache-2.0" in face
    assert run("domains").out == ended.out


def test_domains_list_json(run):
    rows = [json.loads(line) for line in run("domains", "list", "--json").lines]
    assert {"face", "cat", "art"} <= {row["name"] for row in rows}
    assert all({"name", "source", "reason"} <= set(row) for row in rows)


def test_a_users_domain_is_listed(run, world):
    folder = discovery.user_domains_folder()
    folder.mkdir(parents=True)
    os.symlink(world.pack, folder / "my_faces")
    row = next(row for row in run("domains", "list").lines if row.startswith("my_faces"))
    assert "user" in row and "tiny ready" in row
    told = json.loads(run("domains", "info", "my_faces", "--json").out)
    assert told["descriptor"] == "face"
    assert told["weights"]["tiny"]["state"] == "ready"


def test_a_broken_domain_hurts_nobody_and_is_explained(run):
    folder = discovery.user_domains_folder() / "sick"
    folder.mkdir(parents=True)
    (folder / "domain.toml").write_text("schema = 1\nname = \x1b[31m")
    ended = run("domains", "list")
    assert ended.code == 0
    row = next(row for row in ended.lines if row.startswith("sick"))
    assert "broken" in row.split() and "did not load" in row
    assert any(row.startswith("face") for row in ended.lines)
    assert "\x1b" not in ended.out


def test_domain_info(run):
    text = run("domains", "info", "face").out
    assert "descriptor" in text and "15 steps" in text


# ── the console itself ──


def test_quiet_keeps_errors(capfd):
    quiet = console.Console(quiet=True)
    quiet.note("a")
    quiet.warning("b")
    quiet.error(UsageError("c", hint="d"))
    assert capfd.readouterr().err == "error: c\nd\n"


def test_json_says_warnings_as_json(capfd):
    console.Console(json=True).warning("careful")
    assert json.loads(capfd.readouterr().err) == {"warning": {"message": "careful"}}


def test_plain_progress_is_sparse(capfd, monkeypatch):
    from e4t_cli.progress import Progress

    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with console.Console().progress() as on_progress:
        on_progress(Progress(stage="load", done=0, total=1))
        on_progress(Progress(stage="load", done=1, total=1))
        for done in range(1, 101):
            now[0] += 1
            on_progress(Progress(stage="tune", done=done, total=100, values={"loss": 0.25}))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "load"
    assert lines[1] == "tune 1/100 loss 0.25"
    assert lines[-1] == "tune 100/100 loss 0.25"
    assert len(lines) <= 13


def test_notes_of_a_stage_are_warnings(capfd):
    from e4t_cli.progress import Progress

    with console.Console().progress() as on_progress:
        on_progress(Progress(stage="prepare", note="no face was found"))
    assert capfd.readouterr().err == "warning: no face was found\n"


def test_an_unforeseen_fault_is_one_line(run, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("some\nthing")

    monkeypatch.setattr("e4t_cli.registry.discovery.installed_domains", fail)
    ended = run("domains", "list")
    assert ended.code == 1
    assert ended.err.startswith("error: unexpected KeyError: ")
    assert "-vv" in ended.err and "Traceback" not in ended.err
    monkeypatch.setenv("E4T_DEBUG", "1")
    assert "Traceback" in run("domains", "list").err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "/x cannot be written: Permission denied"),
        (OSError(30, "Read-only file system", "/x"), 2, "its permissions do not allow it"),
        (OSError(28, "No space left on device", "/x"), 6, "make room"),
        (OSError(28, "No space left on device"), 6, "make room"),
        (EOFError("cut"), 1, "unexpected EOFError: cut"),
        (ConnectionError("x"), 1, "unexpected ConnectionError"),
    ],
)
def test_what_no_command_expected(run, monkeypatch, error, code, words):
    """The disk and permissions are never a bug of this program, and a permission is never a lack of room."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("e4t_cli.registry.discovery.installed_domains", fail)
    monkeypatch.setattr(console, "discard_stdout", lambda: None)
    ended = run("domains", "list")
    assert ended.code == code and words in ended.err
    assert ("make room" in ended.err) == (code == 6) and ("bug" in ended.err) == (code == 1)


def test_a_folder_that_may_not_be_written_to(run, tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    monkeypatch.setattr("e4t_cli.images.results.os.access", lambda path, mode: False)
    ended = run("personalize", "face", "p.png", "S* x", "-o", "closed")
    assert ended.code == 2
    assert "cannot be written to" in ended.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("e4t personalize fa", ["face"]),
        ("e4t personalize face me.jpg --base sd1", ["sd14", "sd15"]),
        ("e4t generate me.e4t --scheduler dpm", ["dpm++", "dpm++-karras"]),
        ("e4t generate me.e4t --dtype ", ["auto", "bf16", "fp16", "fp32"]),
        ("e4t fetch sd14 --device c", ["cpu", "cuda", "cuda:0", "cuda:1"]),
        ("e4t personalize face me.jpg --tuning ", ["full", "lora"]),
    ],
)
def test_the_shell_completes(run, monkeypatch, words, expected):
    count = len(words.split()) - (not words.endswith(" "))
    for name, value in {"_E4T_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}.items():
        monkeypatch.setenv(name, value)
    assert sorted(run().out.split()) == expected


def test_completion_and_help_list_every_scheduler(run):
    from e4t_cli.schedulers import SCHEDULERS

    words = run("generate", "--help").out
    assert all(name in words for name in SCHEDULERS)
