"""Invariants of several photos of one subject: one photo is what it was, and several are drawn from evenly."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from e4t_cli.errors import IntegrityError
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.recognition import recognize
from e4t_cli.formats.textual_inversion import mean_concept_embedding
from e4t_cli.models.photos import encode_latents, mean_image_features, photo_of_samples
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig
from e4t_cli.nn.randomness import draw
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.training.loss import latent_mask
from e4t_cli.training.tuning import PhotoSamples, tune
from tests.conftest import drawn_face


def photos_of(count):
    return [PreparedImage(image=image, mask=mask) for image, mask in map(drawn_face, range(count))]


def weights(tuned):
    return {**tuned.unet.state_dict(), **{f"E.{key}": value for key, value in tuned.encoder.state_dict().items()}}


def equal(one, other):
    return all(torch.equal(value, weights(other)[key]) for key, value in weights(one).items())


# ── which photo a sample is of ──


@pytest.mark.parametrize(("photos", "batch_size"), [(1, 16), (2, 16), (3, 16), (16, 16), (40, 16), (5, 2)])
def test_photos_are_drawn_from_evenly(photos, batch_size):
    total = torch.zeros(photos, dtype=torch.int64)
    for step in range(30):
        which = photo_of_samples(7, step, photos=photos, batch_size=batch_size)
        counts = torch.bincount(which, minlength=photos)
        total += counts
        assert len(which) == batch_size and len(counts) == photos
        assert counts.max() - counts.min() <= 1 and total.max() - total.min() <= 1


def test_every_photo_is_seen_at_every_noise_level():
    """Sample k has the k-th range of noise levels: with a fixed order a photo would see a third of them."""
    seen = torch.zeros(16, 3)
    for step in range(60):
        which = photo_of_samples(1, step, photos=3, batch_size=16)
        seen[torch.arange(16), which] += 1
        assert torch.equal(which, photo_of_samples(1, step, photos=3, batch_size=16))
    assert seen.min() >= 5
    assert not torch.equal(which, photo_of_samples(2, 59, photos=3, batch_size=16))


# ── one photo ──


def test_one_photo_gives_the_bits_it_always_gave(model, domain_weights, face):
    """The samples of a step by the formula for one photo, written out."""
    config = domain_weights.tuning.replace(mask=True)
    for photos in (face, [face]):
        samples = PhotoSamples(model, domain_weights, photos, config, 3)
        pixels = model.pixels([face.image])
        drawn = draw(
            3, 1, range(config.batch_size), batch_size=config.batch_size, train_timesteps=model.train_timesteps,
            shape=model.latent_shape,
        )  # fmt: skip
        batch = samples.batch(samples.of(1), domain_weights.encoder)
        assert torch.equal(batch.z_0, model.posterior(pixels).sample(drawn.posterior))
        assert torch.equal(samples.image_features, domain_weights.image_features(model, pixels))
        mask = latent_mask(model.masks([face.mask]), model.latent_shape[1:])
        assert torch.equal(batch.mask, mask.expand(config.batch_size, -1, -1))
    assert equal(tune(model, domain_weights, face), tune(model, domain_weights, [face]))


# ── several ──


def test_each_sample_is_of_its_photo(model, domain_weights):
    photos = photos_of(3)
    photos[1] = PreparedImage(image=photos[1].image)  # without a mask: all of it counts
    config = domain_weights.tuning.replace(mask=True, batch_size=5)
    samples = PhotoSamples(model, domain_weights, photos, config, 3)
    posterior, *_, which = values = samples.of(2)
    batch = samples.batch(values, domain_weights.encoder)
    for row, number in enumerate(which.tolist()):
        photo = photos[number]
        alone = model.posterior(model.pixels([photo.image]))
        assert torch.equal(batch.z_0[row : row + 1], alone.sample(posterior[row : row + 1]))
        white = Image.new("L", photo.image.size, 255)
        mask = latent_mask(model.masks([photo.mask or white]), model.latent_shape[1:])
        assert torch.equal(batch.mask[row : row + 1], mask)
    part = samples.batch([one[2:4] for one in values], domain_weights.encoder)
    assert torch.equal(part.z_0, batch.z_0[2:4]) and torch.equal(part.mask, batch.mask[2:4])


def test_an_encoding_does_not_depend_on_the_other_photos(model):
    photos = photos_of(3)
    together = encode_latents(model, photos)
    for number, photo in enumerate(photos):
        assert torch.equal(together.mean[number], encode_latents(model, [photo]).mean[0])


def test_the_mean_of_features_is_the_mean_of_what_encoders_make_of_them(model, domain_weights):
    photos = photos_of(3)
    each = [domain_weights.image_features(model, model.pixels([one.image])) for one in photos]
    mean = mean_image_features(model, domain_weights, photos)
    assert torch.equal(mean, torch.cat(each).mean(dim=0, keepdim=True)) and not torch.equal(mean, each[0])
    encode = domain_weights.encoder.encode_image
    torch.testing.assert_close(encode(mean), torch.stack([encode(one) for one in each]).mean(dim=0))


def test_the_public_encoder_is_affine_in_its_features_too():
    config = PatchEncoderConfig(
        unet_width=8, hidden_width=16, embedding_width=4, tower_width=8, tower_layers=1, tower_heads=1,
        tower_image_size=8, tower_patch_size=4,
    )  # fmt: skip
    encoder = PatchEncoder(config)
    features = torch.randn(3, config.vectors, 8, generator=torch.Generator().manual_seed(0))
    expected = encoder.encode_image(features).mean(dim=0, keepdim=True)
    torch.testing.assert_close(encoder.encode_image(features.mean(dim=0, keepdim=True)), expected)


def test_tuning_depends_on_every_photo_and_on_nothing_else(model, domain_weights):
    photos = photos_of(3)
    config = domain_weights.tuning.replace(batch_size=4)
    three = tune(model, domain_weights, photos, config)
    assert equal(three, tune(model, domain_weights, tuple(photos), config))
    assert not equal(three, tune(model, domain_weights, photos[:2], config))
    features = mean_image_features(model, domain_weights, photos)[0]
    changed = [*photos[:2], PreparedImage(image=photos[2].image.rotate(90), mask=photos[2].mask)]
    assert not equal(three, tune(model, domain_weights, changed, config, image_features=features))
    one, several = (mean_concept_embedding(model, three, some).embedding for some in (photos[0], photos))
    assert several.isfinite().all() and not torch.equal(one, several)


def test_a_concept_needs_a_photo(model, domain_weights):
    with pytest.raises(ValueError, match="a photo"):
        tune(model, domain_weights, [])


# ── files ──


@pytest.fixture
def concept(model, domain_weights):
    first, second, third = photos_of(3)
    return Concept(
        domain="face", descriptor="face", base_name="tiny", base_fingerprint=model.fingerprint, weights_digest="",
        prepared=first, others=(PreparedImage(image=second.image), third), image_sha256="a", others_sha256=("b", "c"),
        image_features=mean_image_features(model, domain_weights, [first, second, third])[0],
        config=domain_weights.tuning, seed=5,
    )  # fmt: skip


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["e4t"])


def test_a_concept_keeps_all_of_its_photos(model, domain_weights, concept, tmp_path):
    concept.save(tmp_path / "me.e4t")
    again = Concept.load(tmp_path / "me.e4t")
    assert again.photos_sha256 == ("a", "b", "c")
    for one, other in zip(concept.photos, again.photos, strict=True):
        assert one.image.tobytes() == other.image.tobytes() and (one.mask is None) == (other.mask is None)
        assert one.mask is None or one.mask.tobytes() == other.mask.tobytes()
    first, second = (
        tune(model, domain_weights, one.photos, one.config, seed=one.seed, image_features=one.image_features)
        for one in (concept, again)
    )
    assert equal(first, second)
    found = recognize(tmp_path / "me.e4t")
    assert (found.type, found.facts["photos"], found.facts["masked_photos"]) == ("concept", 3, 2)


def test_the_file_of_one_photo_is_that_of_earlier_versions(concept, tmp_path):
    one = dataclasses.replace(concept, others=(), others_sha256=())
    one.save(tmp_path / "one.e4t")
    concept.save(tmp_path / "three.e4t")
    assert header_of(tmp_path / "one.e4t")["schema"] == 1 and "others_sha256" not in header_of(tmp_path / "one.e4t")
    assert set(load_file(tmp_path / "one.e4t")) == {"image", "mask", "image_features"}
    # Earlier versions refuse what has another schema than 1, before they look at anything else.
    assert header_of(tmp_path / "three.e4t")["schema"] == 2
    assert "photos" not in recognize(tmp_path / "one.e4t").facts


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"schema": 1}, {}),
        ({"schema": 3}, {}),
        ({"others_sha256": ["b"]}, {}),
        ({"others_sha256": ["b", "c", "d"]}, {}),
        ({"others_sha256": []}, {}),
        ({"others_sha256": "bc"}, {}),
        ({"others_sha256": ["b", 3]}, {}),
        ({}, {"image.3": torch.zeros(32, 32, 3, dtype=torch.uint8)}),
        ({}, {"mask.1": torch.zeros(8, 8, dtype=torch.uint8)}),
        ({}, {"image.1": torch.zeros(32, 16, 3, dtype=torch.uint8)}),
    ],
)  # fmt: skip
def test_damaged_files_of_several_photos_are_refused(concept, tmp_path, changes, tensors):
    path = tmp_path / "me.e4t"
    concept.save(path)
    header, values = header_of(path), load_file(path)
    save_file({**values, **tensors}, path, {"e4t": json.dumps({**header, **changes})})
    with pytest.raises(IntegrityError):
        Concept.load(path)
