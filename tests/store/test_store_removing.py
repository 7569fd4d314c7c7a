"""`remove_domain` removes user domains, and nothing else."""

import os

import pytest

from e4t_cli.errors import UsageError
from e4t_cli.registry.discovery import find_domain, installed_domains, user_domains_folder
from e4t_cli.registry.store import add_domain, remove_domain
from tests.store.conftest import write_domain_folder


def test_it_is_gone(folder):
    for name in ("my_dogs", "user:my_dogs"):
        add_domain(folder)
        assert remove_domain(name) == user_domains_folder() / "my_dogs"
        assert os.listdir(user_domains_folder()) == []
        with pytest.raises(UsageError):
            find_domain("my_dogs")
    assert folder.is_dir()


def test_a_broken_one_too():
    broken = user_domains_folder() / "sick"
    broken.mkdir(parents=True)
    (broken / "domain.toml").write_text("schema = ")
    remove_domain("sick")
    assert not broken.exists()


def test_of_a_link_only_the_link_goes(folder):
    user_domains_folder().mkdir(parents=True)
    (user_domains_folder() / "my_dogs").symlink_to(folder)
    remove_domain("my_dogs")
    assert (folder / "domain.toml").is_file()
    assert os.listdir(user_domains_folder()) == []


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("face", "comes with e4t", "E4T_DOMAINS"),
        ("nobody", "no domain 'nobody' among your own", "e4t domains list"),
        ("../evil", "domain name", None),
        ("user:..", "domain name", None),
        ("", "domain name", None),
        ("\x1b[31m", "domain name", None),
    ],
)
def test_what_is_no_user_domain(name, says, hint):
    evil = user_domains_folder().parent / "evil"
    evil.mkdir(parents=True)
    with pytest.raises(UsageError, match=says) as caught:
        remove_domain(name)
    assert hint is None or hint in caught.value.hint
    assert "\x1b" not in str(caught.value)
    assert evil.is_dir()


def test_user_weights_of_an_installed_domain(tmp_path):
    add_domain(write_domain_folder(tmp_path / "x", name="face"))
    remove_domain("face")
    assert find_domain("face").descriptor == "face"
    assert not [row for row in installed_domains() if row.package == "user"]


def test_an_interrupt_leaves_no_half(folder, monkeypatch):
    """Killed while the files go: the name is gone, and the next addition sweeps the rest."""
    add_domain(folder)

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("e4t_cli.registry.store.shutil.rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_domain("my_dogs")
    assert not [row for row in installed_domains() if row.package == "user"]
