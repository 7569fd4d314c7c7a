"""The README and the guides agree with the program.

Command lines in fenced blocks are parsed by the program's own parser; the README's daily commands
and the marked Python blocks of docs/python.md are run on the packaged base. Every option is documented, and every
documented option exists.
"""

import dataclasses
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from e4t_cli.cli import app
from e4t_cli.errors import E4TError
from e4t_cli.hub.bases import installed_bases
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.registry.discovery import find_domain, weights_folder
from e4t_cli.registry.domain import Domain

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "domains" / "README.md"]
FENCE = re.compile(r"^(?P<run><!-- run -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
PHOTO = ROOT / "examples" / "me.png"


def blocks(guide: Path, language: str):
    """Yield (line, marked, body) of the fenced blocks of a language."""
    text = guide.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found["language"] == language:
            line = text.count("\n", 0, found.start()) + 1
            yield line, found["run"] is not None, found["body"]


def command_lines(guide: Path):
    """Yield (line, words) for each `e4t …` in the guide's shell blocks."""
    for language in ("console", "bash", "sh", "shell"):
        for line, _, body in blocks(guide, language):
            joined = re.sub(r"\\\n\s*", " ", body)
            for command in re.findall(r"^(?:\$ )?(?:.*\| )?e4t (.*)$", joined, re.M):
                yield line, shlex.split(command, comments=True)


DOCUMENTED = [
    pytest.param(words, id=f"{guide.relative_to(ROOT)}:{line} e4t {' '.join(words)[:50]}")
    for guide in GUIDES
    if guide.is_file()
    for line, words in command_lines(guide)
]


def packaged(domain: str) -> bool:
    """Whether this checkout has the embedded base, the domain's weights for it, and the photo."""
    value: Domain = find_domain(domain)
    try:
        return bool([weights_folder(value, base.name) for base in installed_bases()])
    except E4TError:
        return False


needs_weights = pytest.mark.skipif(
    not (packaged("face") and PHOTO.is_file()),
    reason="this checkout has no embedded base, face pack or examples/me.png yet: make mini",
)


def test_the_guides_document_commands():
    assert len(DOCUMENTED) >= 8


@pytest.mark.parametrize("words", DOCUMENTED)
def test_documented_commands_are_understood(words, monkeypatch):
    """Every word is parsed by the real program; only the work behind it is left out."""
    import typer

    reached = []

    class Reached(E4TError):
        exit_code = 99

    def note(*arguments, **options):
        reached.append(arguments)
        raise Reached("parsed")

    placeholders = {"DOMAIN": "face", "IMAGE": "me.jpg", "PROMPT...": "S* x", "…": "S* x"}
    words = [placeholders.get(word, word) for word in words]
    assert isinstance(app.app, typer.Typer)
    for command in app.app.registered_commands:
        monkeypatch.setattr(command, "callback", stand_in(command.callback, note))
    for group in app.app.registered_groups:
        for command in group.typer_instance.registered_commands:
            monkeypatch.setattr(command, "callback", stand_in(command.callback, note))
    code = app.run(words)
    assert code == (0 if {"--help", "-h", "--version"} & set(words) else 99)


def stand_in(callback, note):
    """Return a function with the command's signature that only raises `Reached`."""
    import functools

    @functools.wraps(callback)
    def reach(*arguments, **options):
        note(*arguments, **options)

    return reach


# ── options, exit codes, links ──

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")
# Of launchers, of `python -m …`, of prompt files, in a prompt, and of the versions before, in CHANGELOG.md.
OTHERS_OPTIONS = {
    *("--num_machines", "--nnodes", "--nproc-per-node", "--faces", "--photos", "--concept-scales", "--export-ranks"),
    *("--n", "--n-iter", "--s", "--neg", "--cfg-scale", "--sampler-name", "--prompt", "--sale", "--rounds", "--size"),
    *("--yunet", "--pictures", "--write", "--identities", "--sampling-steps", "--sets"),
    *("--against", "--pairs", "--rows", "--cores", "--tiny", "--parts", "--table", "--parallel", "--minutes"),
}


def options_of(command, name=()):
    """Yield (command, its option strings) of a command and everything below it."""
    yield " ".join(name), {one for p in command.params for one in (*p.opts, *p.secondary_opts) if one[:1] == "-"}
    for below, one in getattr(command, "commands", {}).items():
        yield from options_of(one, (*name, below))


def every_option():
    import typer

    return dict(options_of(typer.main.get_command(app.app)))


def test_every_option_is_documented():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for command, options in every_option().items():
        found = {one for one in options if re.search(rf"(?<![\w-]){one}(?![\w-])", page)}
        assert options <= found, f"e4t {command}: docs/commands.md lacks {options - found}"


@pytest.mark.parametrize(
    "guide", [*GUIDES, ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"], ids=lambda g: g.name
)
def test_documented_options_exist(guide):
    known = set().union(*every_option().values()) | OTHERS_OPTIONS | {"--help"}
    assert set(OPTION.findall(guide.read_text(encoding="utf-8"))) <= known


def test_the_exit_codes_are_documented():
    from e4t_cli import errors

    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    shown = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in row.split(",")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, E4TError)]
    assert shown == {0, 130, 143, app.READER_ENDED} | {kind.exit_code for kind in kinds}


def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings, and its own."""
    text = page.read_text(encoding="utf-8")
    titles = [
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    ]
    return {*titles, *re.findall(r'<a id="([^"]+)">', text)}


@pytest.mark.parametrize(
    "guide", [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(guide):
    text = re.sub(r"^```.*?^```$", "", guide.read_text(encoding="utf-8"), flags=re.M | re.S)
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in address:
            continue
        path, _, anchor = address.partition("#")
        page = (guide.parent / path) if path else guide
        assert page.exists(), f"{guide.name}: {address}"
        assert not anchor or anchor in anchors(page), f"{guide.name}: {address}"


@pytest.mark.parametrize("command", sorted(every_option()))
def test_help_is_short_lines(command, capsys, monkeypatch):
    """On 80 columns no option takes more than five lines."""
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    longest = run = 0
    for line in lines:
        run = run + 1 if re.match(r"│ {18,}\S", line) else 0  # a line that continues a text
        longest = max(longest, run)
    assert longest <= 4, "shorten the help of this option"


# ── run on the packaged base ──


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like a clone's, with the example in it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_commands(section: str, *first: str):
    """The distinct command lines of one section of the README that begin so."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.count("\n", 0, text.index(f"## {section}\n")) + 1
    after = text.find("\n## ", text.index(f"## {section}\n"))
    end = text.count("\n", 0, after) + 1
    lines = command_lines(ROOT / "README.md")
    found = [words for line, words in lines if start < line < end and words[0] in first]
    return list(dict.fromkeys(map(tuple, found)))


@needs_weights
def test_the_readmes_daily_lines_run(checkout, capfd, monkeypatch):
    """The README's own lines, in order, with fewer steps: what one saves, the next one reads."""
    daily = readme_commands("Daily use", "personalize", "generate", "export", "domains", "info")
    assert daily, "README.md shows no command"
    for words in daily:
        arguments = list(words)
        for word in arguments:  # a reader's own photo is any photo
            photo = arguments[0] == "personalize" and word.endswith((".jpg", ".jpeg", ".png"))
            if photo and not Path(word).exists():
                shutil.copy(PHOTO, word)
        if arguments[0] == "personalize":
            arguments += ["-n", "1", "--steps", "2", "--tune-steps", "1", "-q"]
        if "-" in arguments:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PHOTO.read_bytes())))
        if arguments[0] == "generate":
            arguments += ["-n", "1", "--steps", "2", "-q"]
        capfd.readouterr()
        code = app.run(arguments)
        out, err = capfd.readouterr()
        assert code == 0, f"e4t {shlex.join(arguments)}\n{err}"
        if arguments[0] in ("personalize", "generate"):
            assert out.splitlines() and all(Path(path).is_file() for path in out.splitlines())


@needs_weights
def test_the_readmes_pretraining_example_runs(checkout, capfd):
    """A folder of dogs becomes a domain that knows a dog, in fewer steps than the reader takes."""
    shorter = {
        "pretrain": ["--steps", "2", "--batch", "2", "-q"],
        "personalize": ["--steps", "2", "--tune-steps", "1", "-q"],
    }
    commands = readme_commands("A domain of your own", *shorter)
    assert [words[0] for words in commands] == ["pretrain", "personalize"]
    for number in range(4, 200):  # four images test as much as two hundred
        (checkout / "examples" / "dogs" / f"dog-{number:03d}.png").unlink()
    for words in commands:
        capfd.readouterr()
        code = app.run([*words, *shorter[words[0]]])
        out, err = capfd.readouterr()
        assert code == 0, f"e4t {shlex.join(words)}\n{err}"
        assert all(Path(path).exists() for path in out.splitlines()) and out


PYTHON = ROOT / "docs" / "python.md"


def test_python_blocks_compile():
    for guide in GUIDES:
        if guide.is_file():
            for line, _, body in blocks(guide, "python"):
                compile(body, f"{guide.name}:{line}", "exec")


@needs_weights
def test_the_marked_python_blocks_run_in_order(checkout, capsys, monkeypatch):
    """Those that leave the steps to the config take two: the quality is not tested."""
    whole = DomainWeights.load

    def load(folder):
        domain_weights = whole(folder)
        return dataclasses.replace(domain_weights, tuning=domain_weights.tuning.replace(steps=2))

    monkeypatch.setattr(DomainWeights, "load", load)
    (checkout / "outputs").mkdir()
    marked = [(line, body) for line, run, body in blocks(PYTHON, "python") if run]
    assert len(marked) >= 5
    names: dict[str, object] = {"__name__": "guide"}
    for line, body in marked:
        exec(compile(body, f"python.md:{line}", "exec"), names)
    out, err = capsys.readouterr()
    assert "[1, 2]" in out and "does not name the concept" in out
    assert err == ""  # the library is silent
