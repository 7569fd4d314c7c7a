"""The public checkpoint from a hub: licence, download, and one conversion that is cached."""

import dataclasses

import pytest

import e4t_cli
from e4t_cli.api import importing as public_weights
from e4t_cli.api.importing import fetch_converted
from e4t_cli.api.resolve import needs_image_tower, resolve_domain_weights
from e4t_cli.errors import IntegrityError, WeightsUnavailable
from e4t_cli.formats.e4t_diffusion.__main__ import read_pickled_tensors
from e4t_cli.formats.e4t_diffusion.conversion import convert_to_domain_folder
from e4t_cli.hub import cache
from e4t_cli.hub.bases import (
    PUBLISHED,
    converted_weights_folder,
    converted_weights_path,
    e4t_diffusion_repository,
    read_base,
)
from e4t_cli.hub.paths import HubAccess, user_cache
from e4t_cli.hub.repo_info import forget_repository
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.discovery import find_domain, user_domains_folder, weights_folder
from e4t_cli.registry.domain import Domain
from tests.conftest import drawn_face
from tests.hub.fake_hub import Fault

THEIRS = "mkshing/e4t-diffusion-ffhq-celebahq-v1"
LOCATION = f"e4t-diffusion:{THEIRS}"
YES = HubAccess(accept_license=True)


@pytest.fixture
def domain():
    """As `face`, with prompt templates that fit the context length of the tiny base."""
    return Domain(
        name="face",
        descriptor="face",
        tuning=TuningConfig(steps=1, base_learning_rate=1e-5, reg_weight=0.1, batch_size=2),
        prompt_templates=("{}", "a photo of {}"),
        weights={"sd14": LOCATION},
    )


@pytest.fixture
def sd14(base_folder):
    """The tiny base under the name of Stable Diffusion 1.4."""
    return dataclasses.replace(read_base(base_folder), name="sd14")


@pytest.fixture
def published(hub, checkpoint):
    return hub.add(THEIRS, checkpoint, licence="")


@pytest.fixture
def conversions(monkeypatch):
    """Count them, and convert in this process: starting another takes seconds (see _import)."""
    calls = []

    def convert(request, target, on_progress=None):
        calls.append(request)
        target.mkdir(parents=True)
        return convert_to_domain_folder(request, target, read_pickled_tensors)

    monkeypatch.setattr(public_weights, "convert", convert)
    return calls


def test_the_face_domain_names_the_public_weights():
    face = find_domain("face")
    assert face.weights["sd14"] == LOCATION
    assert e4t_diffusion_repository(LOCATION) == THEIRS
    assert e4t_diffusion_repository("hub:a/b@" + "0" * 40) is None
    assert e4t_diffusion_repository("e4t-diffusion:../x") is None
    with pytest.raises(WeightsUnavailable, match="are on the hub") as caught:
        weights_folder(face, "sd14")
    assert caught.value.hint == "e4t fetch face --base sd14"


@pytest.mark.parametrize(("name", "hours"), [("cat", "5.1 hours"), ("art", "8.4 hours")])
def test_cat_and_art_have_no_public_weights(name, hours):
    domain = find_domain(name)
    with pytest.raises(WeightsUnavailable, match="nobody has published any") as caught:
        weights_folder(domain, "sd14")
    assert f"e4t pretrain --domain {name} --base sd14 --data FOLDER" in caught.value.hint
    assert f"{domain.pretraining.steps:,} steps, about {hours} of an A100" in caught.value.hint
    assert caught.value.exit_code == 4


def test_the_licence_first_then_once_and_for_all(
    hub,
    published,
    domain,
    sd14,
    conversions,
    base_folder,
    tmp_path,
):
    with pytest.raises(WeightsUnavailable, match="has not been accepted") as caught:
        resolve_domain_weights(domain, sd14, HubAccess())
    assert "--accept-license" in caught.value.hint
    assert not hub.count("GET", "*.pt")
    questions, events = [], []
    asking = HubAccess(
        accept_license=lambda question: bool(questions.append(question) or True),
        on_progress=events.append,
    )
    folder = resolve_domain_weights(domain, sd14, asking)
    assert len(questions) == 1
    assert "states no licence" in questions[0]
    assert "non-commercial" in questions[0]
    assert folder == converted_weights_path(THEIRS, published)
    assert user_cache() in folder.parents
    domain_weights = DomainWeights.load(folder)
    assert "non-commercial" in domain_weights.licence
    assert THEIRS in domain_weights.notes
    assert published in domain_weights.notes
    assert domain_weights.tuning == domain.tuning
    assert len(conversions) == 1
    # The child compares with what the hub declares, too.
    assert set(conversions[0].sha256) == {"encoder.pt", "weight_offsets.pt"}
    assert any("largest error of a ΔW" in event.remark for event in events)
    assert "fetch" in {event.stage for event in events}
    # From here on: no question, no request, no conversion, no network at all.
    requests_before = len(hub.requests)
    hub.faults.append(Fault("hang"))
    assert resolve_domain_weights(domain, sd14, HubAccess(offline=True)) == folder
    assert weights_folder(domain, "sd14") == folder
    forget_repository(THEIRS)
    assert converted_weights_folder(LOCATION) == folder
    assert len(hub.requests) == requests_before
    assert len(conversions) == 1
    photo = tmp_path / "photo.png"
    drawn_face(size=80)[0].save(photo)
    from e4t_cli.models.text_to_image import TextToImageModel

    model = TextToImageModel.load(sd14)
    done = e4t_cli.personalize(domain, photo, "S* on the beach", base=model, seed=3, sampling={"steps": 2})
    assert len(done.images) == 1
    assert done.concept.base_name == "sd14"


def test_a_damaged_conversion_is_made_again(hub, published, domain, conversions):
    """`e4t fetch` repairs; the originals can be pruned, and the domain weights removed."""
    folder = fetch_converted(domain, "sd14", LOCATION, YES)
    whole = (folder / "offsets.safetensors").read_bytes()
    with (folder / "offsets.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(IntegrityError, match="damaged"):
        DomainWeights.load(folder)
    assert fetch_converted(domain, "sd14", LOCATION, YES, repair=True) == folder
    assert (folder / "offsets.safetensors").read_bytes() == whole
    assert len(conversions) == 2
    fetch_converted(domain, "sd14", LOCATION, YES, repair=True)
    assert len(conversions) == 2

    names = {(item.kind, item.name) for item in cache.list_cache()}
    assert names == {("repository", THEIRS), ("converted weights", LOCATION)}
    gone = cache.prune()
    assert {item.path.name for item in gone} == {"encoder.pt", "weight_offsets.pt"}
    assert fetch_converted(domain, "sd14", LOCATION, HubAccess(offline=True)) == folder
    for item in cache.find_items(LOCATION):
        cache.remove(item)
    assert converted_weights_folder(LOCATION) is None


def test_D14_offline_and_never_fetched(hub, domain, sd14):
    with pytest.raises(WeightsUnavailable, match="offline") as caught:
        resolve_domain_weights(domain, sd14, HubAccess(offline=True))
    assert caught.value.exit_code == 4
    assert "e4t fetch face --base sd14" in caught.value.hint
    assert not hub.requests


def test_D4_a_corrupt_checkpoint_is_never_read(hub, published, domain, conversions):
    hub.faults.append(Fault("corrupt", path="*/encoder.pt"))
    with pytest.raises(IntegrityError, match="expected checksum"):
        fetch_converted(domain, "sd14", LOCATION, YES)
    assert conversions == []
    assert converted_weights_folder(LOCATION) is None


def test_a_repository_that_lacks_a_file(hub, checkpoint, domain):
    (checkpoint / "encoder.pt").unlink()
    hub.add(THEIRS, checkpoint, licence="")
    with pytest.raises(WeightsUnavailable, match=r"encoder\.pt"):
        fetch_converted(domain, "sd14", LOCATION, YES)


def test_weights_with_a_tower_need_none_of_the_base(hub, converted, domain):
    """The public weights bring their image tower: the base's 3.9 GB are not fetched."""
    assert not needs_image_tower(domain, "sd14")
    assert not needs_image_tower(domain, "CompVis/stable-diffusion-v1-4")
    assert needs_image_tower(find_domain("face"), "mini")
    assert needs_image_tower(find_domain("cat"), "sd14")
    assert needs_image_tower(None, "sd14")
    domain_weights, _, _ = converted
    own = user_domains_folder() / "cat"
    dataclasses.replace(domain_weights, name="cat", base_name="sd14").save(own)
    assert not needs_image_tower(find_domain("cat"), "sd14")


def test_weights_that_the_user_made_come_first(hub, converted, domain, sd14):
    """The user's domain weights for that base are used before four gigabytes are fetched."""
    domain_weights, _, _ = converted
    own = user_domains_folder() / "face"
    dataclasses.replace(domain_weights, base_name="sd14").save(own)
    assert resolve_domain_weights(domain, sd14, YES) == own
    assert not hub.requests
    assert "sd14" in PUBLISHED
