"""Plugins that fail or hang (rows G1 to G5 of the reliability table), in separate processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from e4t_cli.api.resolve import find_concept_domain, resolve_domain
from e4t_cli.errors import UsageError
from e4t_cli.registry.discovery import domain_names, find_domain, find_listing, installed_domains
from tests.store.conftest import write_domain_folder

FOREVER = "import time\ntime.sleep(600)"
CHATTY = """
import logging, sys, warnings
print("hello from a plug-in")
sys.stdout.write("and again\\n")
logging.warning("look here")
warnings.warn("old")
from e4t_cli import Domain, TuningConfig
chatty = Domain(
    name="chatty", descriptor="dog",
    tuning=TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4),
)
"""


def e4t(site, *words, timeout=120, **more):
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, "-m", "e4t_cli", *words],
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_G1_a_plugin_that_hangs_delays_only_its_own_use(install, site):
    install("e4t-slow", slow=FOREVER)
    for words in (["--help"], ["domains", "--help"], ["domains", "info", "face"]):
        assert e4t(site, *words).returncode == 0
    words = "e4t personalize sl"
    asked = {"_E4T_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
    assert e4t(site, _TYPER_COMPLETE_ARGS=words, **asked).stdout.split() == ["slow"]
    # The list waits for it, unless the variable excludes it.
    rescued = e4t(site, "domains", "list", E4T_DOMAINS="face,cat")
    assert rescued.returncode == 0 and "slow" not in rescued.stdout
    with pytest.raises(subprocess.TimeoutExpired):
        e4t(site, "domains", "info", "slow", timeout=3)


def test_G1_a_slow_plugin_is_slow_once(install, site, good):
    install("e4t-slow", slow="import time; time.sleep(0.3)\n" + _dedented(good, "slow"))
    find_domain("slow")
    started = time.monotonic()
    find_domain("slow")
    assert installed_domains()
    assert time.monotonic() - started < 0.3


WAYS_TO_FAIL = {
    "exits": "raise SystemExit(3)",
    "fails": "import os\nraise OSError('x')",
    "generates": "raise GeneratorExit",
    "recurses": "raise RecursionError",
    "swells": "raise MemoryError",
    "stutters": "def f(:",
    "null": "\0",
    "stops": "raise StopIteration",
}


def test_G1_whatever_it_raises(install, site):
    install("e4t-broken", **WAYS_TO_FAIL)
    listed = e4t(site, "domains", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in map(json.loads, listed.stdout.splitlines())}
    for name in WAYS_TO_FAIL:
        assert rows[name]["source"] == "e4t-broken 1.0"
        assert rows[name]["reason"].startswith("did not load: ")
    assert rows["face"]["reason"] is None
    used = e4t(site, "domains", "info", "exits")
    assert used.returncode == 1
    assert "domain 'exits' from e4t-broken did not load: SystemExit: 3" in used.stderr
    assert "Traceback" not in used.stderr
    assert "Traceback" in e4t(site, "domains", "info", "exits", E4T_DEBUG="1").stderr


def test_G2_two_of_one_name(install, site, good):
    install("e4t-dogs", dog=good)
    install("more-dogs", dog=good)
    refused = e4t(site, "domains", "info", "dog")
    assert refused.returncode == 2
    assert "claimed by e4t-dogs and more-dogs" in refused.stderr
    assert "e4t-dogs:dog" in refused.stderr
    told = e4t(site, "domains", "info", "more-dogs:dog", "--json")
    assert json.loads(told.stdout)["source"] == "more-dogs 1.0"
    assert find_listing("e4t-dogs:dog").package == "e4t-dogs"


def test_G3_of_another_contract_version(install, site):
    source = "from e4t_cli import Domain\nnew = Domain(name='new', descriptor='x', tuning=None, {})"
    install("e4t-new", new=source.replace("{}", "contract=2"))
    install("e4t-odd", new2=source.replace("{}", "colour='red'").replace("new", "new2"))
    listed = e4t(site, "domains", "list").stdout
    assert "version 2 of the domain contract" in listed
    assert "unexpected keyword argument 'colour'" in listed


def test_G4_what_it_prints_stays_out_of_stdout(install, site):
    install("e4t-chatty", chatty=CHATTY)
    for words in (["domains", "list", "--json"], ["domains", "info", "chatty", "--json"]):
        ended = e4t(site, *words)
        assert ended.returncode == 0
        assert all(json.loads(line) for line in ended.stdout.splitlines())
        assert "hello from a plug-in\nand again\n" in ended.stderr


# ── G5: a concept whose domain has gone ──


def test_G5_the_error_names_what_to_install(install, site, good):
    install("e4t-dogs", dog=good)
    dog, package = resolve_domain("dog")
    assert package == "e4t-dogs"
    assert find_concept_domain("dog", package) is dog
    (site / "e4t_dogs-1.0.dist-info" / "entry_points.txt").unlink()  # as an uninstaller does
    assert "dog" not in domain_names()
    with pytest.raises(UsageError, match="this concept needs the domain 'dog'") as caught:
        find_concept_domain("dog", package)
    assert caught.value.hint == "it came with the package e4t-dogs: pip install e4t-dogs"
    with pytest.raises(UsageError) as caught:  # of a concept from before packages were noted
        find_concept_domain("dog", "")
    assert "e4t domains list" in caught.value.hint


def test_G5_of_one_of_the_users_own(tmp_path):
    from e4t_cli.registry.store import add_domain, remove_domain

    add_domain(write_domain_folder(tmp_path / "pack"))
    assert resolve_domain("my_dogs")[1] == "user"
    remove_domain("my_dogs")
    with pytest.raises(UsageError) as caught:
        find_concept_domain("my_dogs", "user")
    assert "e4t domains add" in caught.value.hint


def test_G5_another_package_of_that_name_is_not_used(install, good):
    install("e4t-dogs", dog=good)
    install("more-dogs", dog=good.replace('descriptor="{name}"', 'descriptor="wolf"'))
    assert find_concept_domain("dog", "e4t-dogs").descriptor == "dog"
    assert find_concept_domain("dog", "more-dogs").descriptor == "wolf"


def test_G5_the_package_is_kept_in_the_file(model, domain_weights, face, tmp_path):
    from dataclasses import replace

    from e4t_cli.formats.concept import Concept

    concept = Concept(
        domain="dog",
        descriptor="dog",
        base_name="tiny",
        base_fingerprint=model.fingerprint,
        weights_digest="",
        prepared=face,
        image_features=model.image_features(model.pixels([face.image]))[0],
        config=domain_weights.tuning,
        seed=5,
    )
    for package in ("e4t-dogs", ""):
        replace(concept, package=package).save(tmp_path / "me.e4t")
        assert Concept.load(tmp_path / "me.e4t").package == package


def _dedented(good, name):
    return "\n".join(line[4:] for line in good.replace("{name}", name).splitlines())
