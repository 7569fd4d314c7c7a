"""Domains from and to the hub: complete, verified, licensed, and private by default."""

import tomllib

import pytest
from huggingface_hub import ModelCard

from e4t_cli.cli import app
from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import find_domain, user_domains_folder
from e4t_cli.registry.domain import Domain
from e4t_cli.registry.publish import publish_domain
from e4t_cli.registry.store import add_domain
from e4t_cli.registry.weights import weights_state
from tests.store.conftest import FILES, manifest_text, write_domain_folder


@pytest.fixture
def folder(tmp_path):
    return write_domain_folder(tmp_path / "pack")


@pytest.fixture
def dogs(folder):
    """A domain of the user's own."""
    return add_domain(folder).domain


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")


# ── from the hub ──


@pytest.mark.parametrize("spelling", ["{}", "hub:{}", "hf://{}"])
def test_a_commit_is_added(hub, folder, spelling):
    (folder / "setup.py").write_text("raise SystemExit")
    commit = hub.add("someone/dogs", folder)
    added = add_domain(spelling.format(f"someone/dogs@{commit}"))
    assert {path.name for path in added.folder.iterdir()} == {"domain.toml", *FILES}
    assert not any(path.is_symlink() for path in added.folder.iterdir())
    assert not [path for _, path in hub.requests if "setup.py" in path]
    assert find_domain("my_dogs").licence == "CC0-1.0"


def test_a_branch_is_added_too(hub, folder):
    hub.add("someone/dogs", folder)
    assert add_domain("someone/dogs@main").domain.name == "my_dogs"


def test_what_the_hub_does_not_have(hub, folder, tmp_path):
    with pytest.raises(WeightsUnavailable, match="no repository"):
        add_domain("someone/nothing@main")
    (folder / "encoder.safetensors").unlink()
    commit = hub.add("someone/half", folder)
    with pytest.raises(WeightsUnavailable, match=r"no file 'encoder\.safetensors'"):
        add_domain(f"someone/half@{commit}")
    (folder / "domain.toml").unlink()
    commit = hub.add("someone/none", folder)
    with pytest.raises(WeightsUnavailable, match=r"no file 'domain\.toml'"):
        add_domain(f"someone/none@{commit}")
    assert not list(user_domains_folder().iterdir())


def test_a_repository_with_a_wrong_manifest(hub, folder):
    """The hub guarantees its files, not the manifest that their author wrote."""
    text = manifest_text(files={**FILES, "encoder.safetensors": FILES["encoder.safetensors"][:-1] + b"!"})
    (folder / "domain.toml").write_text(text)
    commit = hub.add("someone/dogs", folder)
    with pytest.raises(IntegrityError, match=r"encoder\.safetensors .* is damaged"):
        add_domain(f"someone/dogs@{commit}")
    assert not list(user_domains_folder().iterdir())


def test_offline_only_what_is_here(hub, folder):
    commit = hub.add("someone/dogs", folder)
    with pytest.raises(WeightsUnavailable, match="offline") as caught:
        add_domain(f"someone/dogs@{commit}", offline=True)
    assert f"e4t domains add someone/dogs@{commit}" in caught.value.hint
    assert hub.requests == []


def test_the_list_shows_what_is_to_be_fetched(hub, folder):
    commit = hub.add("someone/dogs", folder)
    place = {"toy": f"hub:someone/dogs@{commit}"}
    config = TuningConfig(steps=1, base_learning_rate=1e-6, reg_weight=0)
    plain = Domain(name="dogs", descriptor="dog", tuning=config, weights=place)
    sized = Domain(name="dogs", descriptor="dog", tuning=config, weights=place, download_sizes={"toy": 12345})
    assert (weights_state(plain, "toy").state, weights_state(plain, "toy").size) == ("to fetch", 0)
    assert weights_state(sized, "toy").size == 12345
    assert weights_state(sized, "toy").hint == "e4t fetch dogs --base toy"
    assert hub.requests == []  # listing sends no request
    add_domain(f"someone/dogs@{commit}")
    ready = weights_state(sized, "toy")
    assert (ready.state, ready.size) == ("ready", sum(map(len, FILES.values())))


# ── to the hub ──


def test_weights_are_published_privately(hub, token, dogs):
    done = publish_domain(dogs, "me/e4t-dogs")
    sent = hub.uploads["me/e4t-dogs"]
    assert sent["private"] == b"true" and done.private
    assert {name: sent[name] for name in FILES} == FILES
    assert tomllib.loads(sent["domain.toml"].decode()) == tomllib.loads(manifest_text())
    page = sent["README.md"].decode()
    assert ModelCard(page).data.license == "cc0-1.0"
    assert "e4t domains add me/e4t-dogs@main" in page
    assert "dogs only" in page and "1,234 images" in page
    repository, _, commit = done.location.partition("@")
    assert repository == "me/e4t-dogs" and len(commit) == 40
    # What was published can be named in a plug-in.
    Domain(
        name="x", descriptor="x", tuning=dogs.tuning, weights={"toy": f"hub:{done.location}"},
        download_sizes={"toy": done.size},
    )  # fmt: skip


def test_what_was_published_can_be_added(hub, token, dogs, tmp_path):
    from e4t_cli.registry.store import remove_domain

    publish_domain(dogs, "me/e4t-dogs", licence="My own licence", private=False)
    sent = hub.uploads["me/e4t-dogs"]
    assert sent["private"] == b"false"
    page = sent["README.md"].decode()
    data = ModelCard(page).data
    assert (data.license, data.license_name) == ("other", "My own licence")
    remove_domain("my_dogs")
    again = tmp_path / "again"
    again.mkdir()
    for name in ("domain.toml", "README.md", *FILES):
        (again / name).write_bytes(sent[name])
    added = add_domain(f"me/e4t-dogs@{hub.add('me/e4t-dogs', again)}")
    assert added.domain.licence == "My own licence"


def test_an_open_repository_is_not_used_by_mistake(hub, token, dogs, folder):
    hub.add("me/open", folder)
    with pytest.raises(UsageError, match="open to all: nothing was uploaded"):
        publish_domain(dogs, "me/open")
    assert "me/open" not in hub.uploads
    assert publish_domain(dogs, "me/open", private=False).location.startswith("me/open@")


def test_no_licence_no_publication(hub, token, folder):
    (folder / "domain.toml").write_text(manifest_text(licence=""))
    dogs = add_domain(folder).domain
    with pytest.raises(UsageError, match="has no licence") as caught:
        publish_domain(dogs, "me/e4t-dogs")
    assert "--licence" in caught.value.hint
    assert hub.requests == [] and hub.uploads == {}
    assert publish_domain(dogs, "me/e4t-dogs", licence="MIT").manifest.licence == "MIT"
    # The manifest in the store is unchanged.
    assert find_domain("my_dogs").licence == ""


def test_without_a_token_nothing_is_sent(hub, dogs):
    with pytest.raises(WeightsUnavailable, match="who you are") as caught:
        publish_domain(dogs, "me/e4t-dogs")
    assert caught.value.hint == "hf auth login"
    assert hub.requests == []


def test_damaged_weights_are_not_published(hub, token, dogs):
    path = user_domains_folder() / "my_dogs" / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="is damaged"):
        publish_domain(dogs, "me/e4t-dogs")
    assert hub.uploads == {}


@pytest.mark.parametrize("repository", ["dogs", "../dogs", "me/", "a/b/c", "me/do gs"])
def test_invalid_repository_names(hub, token, dogs, repository):
    with pytest.raises(UsageError):
        publish_domain(dogs, repository)
    assert hub.uploads == {}


def test_weights_for_several_bases(hub, token, dogs):
    with pytest.raises(WeightsUnavailable, match="no weights on this machine for sd14"):
        publish_domain(dogs, "me/e4t-dogs", base="sd14")
    assert publish_domain(dogs, "me/e4t-dogs", base="toy").manifest.base == "toy"
    both = Domain(
        name="my_dogs", descriptor="dog", tuning=dogs.tuning,
        weights={**dogs.weights, "other": dogs.weights["toy"]},
    )  # fmt: skip
    with pytest.raises(UsageError, match="weights for several bases") as caught:
        publish_domain(both, "me/e4t-dogs")
    assert caught.value.hint == "name one: --base toy or other"


def test_the_page_repeats_no_markup(dogs, folder):
    from e4t_cli.registry.manifest import parse_manifest
    from e4t_cli.registry.publish import model_card

    text = manifest_text(limits="<script>x</script> | a\n# b `c`", notes="[x](http://evil)", licence='M"\nT')
    page = model_card(parse_manifest(text.encode(), "it"), dogs, "me/e4t-dogs")
    assert "<script>" not in page and "[x](http" not in page
    assert ModelCard(page).data.license_name == 'M"\nT'
    assert "\n# b" not in page


# ── the commands ──


def test_push_asks_and_prints_the_address(hub, token, dogs, capfd):
    assert app.run(["domains", "push", "my_dogs", "me/e4t-dogs"]) == 2  # no terminal for a question
    assert "nothing was uploaded" in capfd.readouterr().err
    assert hub.uploads == {}
    assert app.run(["domains", "push", "my_dogs", "me/e4t-dogs", "-y", "-q"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("me/e4t-dogs@") and err == ""
    assert hub.uploads["me/e4t-dogs"]["private"] == b"true"
    assert "hf_good" not in out + err
    assert app.run(["domains", "push", "my_dogs", "me/e4t-more", "-y", "--public"]) == 0
    assert hub.uploads["me/e4t-more"]["private"] == b"false"


def test_add_from_the_hub_by_command(hub, folder, capfd):
    commit = hub.add("someone/dogs", folder)
    assert app.run(["domains", "add", f"someone/dogs@{commit}"]) == 0
    assert capfd.readouterr().out == f"{user_domains_folder() / 'my_dogs'}\n"


def test_the_face_detector_is_one_file_whose_licence_asks_nothing(hub, tmp_path):
    from e4t_cli.hub.paths import HubAccess
    from e4t_cli.images.preparation import snapshot_downloader
    from e4t_domains.face_detection import FILE, REPOSITORY

    folder = tmp_path / "detector"
    folder.mkdir()
    for name in (FILE, "face_detection_yunet_2023mar_int8.onnx", "demo.py", "README.md"):
        (folder / name).write_bytes(name.encode() * 50)
    hub.add(REPOSITORY, folder, licence="mit")
    found = snapshot_downloader(HubAccess())(REPOSITORY)
    assert [path.name for path in found.iterdir()] == [FILE]
    hub.requests.clear()
    assert snapshot_downloader(HubAccess(offline=True))(REPOSITORY) == found
    assert not hub.requests
