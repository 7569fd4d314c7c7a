"""The domain registry (rows G1-G4 of the reliability table): broken domains do not affect others."""

import sys

import pytest

from e4t_cli.errors import E4TError, IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import find_domain, installed_domains, user_domains_folder, weights_folder
from e4t_cli.registry.domain import Domain

OURS = ["art", "cat", "face"]

MANIFEST = f"""
schema = 1
name = "{{name}}"
descriptor = "dog"
base = "toy"
base_fingerprint = "{"a" * 64}"
images = 1234
[tuning]
steps = 5
base_learning_rate = 3e-6
embedding_penalty = 1e-4
[pretraining]
steps = 1000
"""


def row(name, package=None):
    found = [r for r in installed_domains() if r.name == name and package in (None, r.package)]
    assert len(found) == 1, found
    return found[0]


def user_folder(name, text=None):
    folder = user_domains_folder() / name
    folder.mkdir(parents=True)
    (folder / "domain.toml").write_text(text or MANIFEST.format(name=name))
    return folder


def test_built_in_domains_are_entry_points_too():
    rows = installed_domains()
    assert [r.name for r in rows] == OURS
    assert all(r.domain and r.reason is None and r.package == "e4t" for r in rows)
    assert find_domain("face") is find_domain("e4t:face") is rows[2].domain


def test_a_good_one(install, good):
    install("e4t-dog", version="2.1", dog=good)
    assert find_domain("dog").descriptor == "dog"
    assert (row("dog").package, row("dog").version) == ("e4t-dog", "2.1")


def test_only_what_was_asked_for_is_imported(install, good):
    install("e4t-zoo", dog=good, bird=good)
    find_domain("dog")
    assert "e4t_zoo_dog" in sys.modules
    assert "e4t_zoo_bird" not in sys.modules


BROKEN = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "absent": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "own": ("class Stop(BaseException): pass\nraise Stop('now')", "Stop: now"),
    "hollow": ("pass", "AttributeError"),
    "wrong": ("wrong = {'name': 'wrong'}", "TypeError: it is of type dict, not Domain"),
    "kind": ("from e4t_cli import Domain as kind", "TypeError: it is of type type, not Domain"),
    "other": ("{good}\nother = dog", "ValueError: its own name is 'dog'"),
    "future": (
        "from e4t_cli import Domain\nfuture = Domain(name='future', descriptor='x', tuning=None, contract=2)",
        "version 2 of the domain contract",
    ),
    "nonsense": (
        "from e4t_cli import Domain, TuningConfig\n"
        "nonsense = Domain(name='nonsense', descriptor='x', tuning=TuningConfig("
        "steps=0, base_learning_rate=1e-6, reg_weight=0))",
        "steps must be 1 or more",
    ),
    "painted": ("raise ValueError('\\x1b[31mred')", "\\x1b[31mred"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ones_fail_only_when_requested(install, good, name):
    source, says = BROKEN[name]
    dog = "\n".join(line[4:] for line in good.replace("{name}", "dog").splitlines())
    install("e4t-broken", **{name: source.replace("{good}", dog)})
    install("e4t-sound", sound=good)
    assert find_domain("sound").name == "sound"
    assert [r.name for r in installed_domains() if r.reason is None] == [*OURS, "sound"]
    listed = row(name)
    assert listed.domain is None
    assert says in listed.reason
    with pytest.raises(E4TError) as caught:
        find_domain(name)
    assert says in str(caught.value)
    assert f"domain {name!r} from e4t-broken did not load" in str(caught.value)
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is not None


def test_ctrl_c_is_not_a_broken_plugin(install):
    install("e4t-slow", slow="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find_domain("slow")


def test_names_that_are_not_names(install, good, site):
    install("e4t-odd", odd=good)
    (site / "e4t_odd-1.0.dist-info" / "entry_points.txt").write_text("[e4t.domains]\n../odd = e4t_odd_odd:odd\n")
    assert "domain name" in row("../odd").reason


def test_two_of_one_name_are_both_refused(install, good):
    install("e4t-dogs", dog=good)
    install("more.dogs", dog="1 / 0")
    with pytest.raises(UsageError, match=r"claimed by e4t-dogs and more\.dogs") as caught:
        find_domain("dog")
    assert caught.value.hint == "name one: e4t-dogs:dog"
    assert find_domain("e4t-dogs:dog").name == find_domain("E4T_Dogs:dog").name == "dog"
    with pytest.raises(E4TError, match="did not load"):
        find_domain("more.dogs:dog")
    assert "also claimed by more.dogs; ask for it as e4t-dogs:dog" in row("dog", "e4t-dogs").reason
    assert "ZeroDivisionError" in row("dog", "more.dogs").reason


def test_ours_are_never_shadowed(install, good):
    ours = find_domain("face")
    install("aaa", face=good)
    user_folder("face")
    assert find_domain("face") is ours
    assert row("face", "e4t").reason is None
    assert "also claimed by e4t" in row("face", "aaa").reason
    assert find_domain("aaa:face").descriptor == "face"
    assert find_domain("user:face").descriptor == "dog"


def test_what_a_plugin_prints_stays_out_of_stdout(install, good, capsys):
    install("e4t-chatty", chatty="print('hello')\n" + "\n".join(x[4:] for x in good.splitlines()))
    find_domain("chatty")
    assert capsys.readouterr() == ("", "hello\n")


def test_unknown_names_get_a_guess():
    with pytest.raises(UsageError, match="no domain 'fcae'") as caught:
        find_domain("fcae")
    assert "did you mean 'face'?" in caught.value.hint
    for name in ("nobody:face", "", ":", "\x1b[31m"):
        with pytest.raises(UsageError) as caught:
            find_domain(name)
        assert "\x1b" not in str(caught.value)


def test_the_environment_narrows(install, good, monkeypatch):
    install("e4t-exits", exits="raise SystemExit")
    monkeypatch.setenv("E4T_DOMAINS", "face, e4t:cat")
    assert [r.name for r in installed_domains()] == ["cat", "face"]
    with pytest.raises(UsageError):
        find_domain("exits")
    monkeypatch.setenv("E4T_DOMAINS", "")
    assert installed_domains() == []


# ---- folders of the user ---------------------------------------------------------------------


def test_a_folder_is_a_domain():
    folder = user_folder("my_dogs")
    for name in ("my_dogs", "user:my_dogs", str(folder)):
        dogs = find_domain(name)
        assert (dogs.name, dogs.tuning.steps, dogs.weights) == ("my_dogs", 5, {"toy": str(folder)})
    assert row("my_dogs").package == "user"
    assert weights_folder(dogs, "toy") == folder


@pytest.mark.parametrize("text", ["schema = ", MANIFEST.format(name="other"), "x" * 2_000_000])
def test_a_damaged_folder_is_a_row(text):
    folder = user_folder("mine", text)
    assert row("mine").domain is None
    assert "did not load" in row("mine").reason
    if "other" not in text:
        with pytest.raises(IntegrityError):
            find_domain(str(folder))


def test_folders_that_are_no_domains(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        find_domain("./nowhere")
    with pytest.raises(UsageError, match="no domain.toml"):
        find_domain(f"{tmp_path}/")


# ---- where weights are -----------------------------------------------------------------------


def domain(**weights):
    config = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0)
    return Domain(name="dog", descriptor="dog", tuning=config, weights=weights)


def test_weights_in_a_package(site):
    domain_folder = site / "dogs" / "packs" / "toy"
    domain_folder.mkdir(parents=True)
    (site / "dogs" / "__init__.py").write_text("1 / 0  # looking for weights imports nothing")
    (domain_folder / "domain.toml").touch()
    assert weights_folder(domain(toy="package:dogs/packs/toy"), "toy") == domain_folder


NOWHERE = ["package:dogs/nowhere", "package:no_such/x", "/no/where"]


@pytest.mark.parametrize("place", NOWHERE)
def test_weights_that_are_not_there(place):
    with pytest.raises(WeightsUnavailable, match="not in this installation") as caught:
        weights_folder(domain(toy=place), "toy")
    assert "e4t pretrain --domain dog --base toy" in caught.value.hint


def test_looking_for_weights_on_the_hub_fetches_nothing():
    with pytest.raises(WeightsUnavailable, match="on the hub .* not on this machine") as caught:
        weights_folder(domain(toy="hub:me/dogs@" + "0" * 40), "toy")
    assert caught.value.hint == "e4t fetch dog --base toy"


@pytest.mark.parametrize("place", [*NOWHERE, "hub:me/dogs@" + "0" * 40])
def test_weights_made_by_the_hints_command_are_found(place):
    """`e4t pretrain --domain dog --base toy` writes the user's folder of that name."""
    dog = domain(toy=place, other=place)
    folder = user_folder("dog")
    assert weights_folder(dog, "toy") == folder
    with pytest.raises(WeightsUnavailable):
        weights_folder(dog, "other")
    (folder / "domain.toml").write_text("schema = ")
    with pytest.raises(IntegrityError):
        weights_folder(dog, "toy")


def test_installed_weights_come_before_the_users_own(tmp_path):
    (tmp_path / "domain.toml").touch()
    user_folder("dog")
    assert weights_folder(domain(toy=str(tmp_path)), "toy") == tmp_path


def test_weights_for_another_base_can_be_the_users_own():
    cat = find_domain("cat")
    with pytest.raises(WeightsUnavailable) as caught:
        weights_folder(cat, "toy")
    assert caught.value.hint == "make them: e4t pretrain --domain cat --base toy --data FOLDER"
    folder = user_folder("cat")
    assert weights_folder(cat, "toy") == folder
    with pytest.raises(WeightsUnavailable):
        weights_folder(cat, "sd14")
