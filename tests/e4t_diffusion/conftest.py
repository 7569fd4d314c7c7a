"""Tiny checkpoints of e4t-diffusion for the tiny base."""

import pytest

from tests.e4t_diffusion import checkpoints
from tests.hub.conftest import hub  # noqa: F401


@pytest.fixture
def sizes(model):
    from e4t_cli.nn.unet import feature_widths
    from e4t_cli.nn.weight_offsets import projection_shapes

    return {
        "unet": sum(feature_widths(model.unet)),
        "embedding": model.text_encoder.config.hidden_size,
        "projections": projection_shapes(model.unet),
    }


@pytest.fixture
def encoder(sizes):
    return checkpoints.encoder_state(sizes["unet"], sizes["embedding"])


@pytest.fixture
def offsets(sizes):
    return checkpoints.offsets_state(sizes["projections"])


@pytest.fixture
def checkpoint(tmp_path, encoder, offsets, monkeypatch):
    """A folder with a whole checkpoint, whose tower is among the patched configs of open_clip."""
    configs = checkpoints.write_open_clip_config(tmp_path / "model_configs")
    monkeypatch.setattr("e4t_cli.formats.e4t_diffusion.checkpoint.configs_folder", lambda: configs)
    return checkpoints.write_checkpoint(tmp_path / "theirs", encoder, offsets)


@pytest.fixture
def converted(checkpoint, tmp_path):
    """Domain weights made of it in this process, with the reader of the child process."""
    from e4t_cli.api.importing import conversion_request
    from e4t_cli.formats.e4t_diffusion.__main__ import read_pickled_tensors
    from e4t_cli.formats.e4t_diffusion.checkpoint import read_checkpoint
    from e4t_cli.formats.e4t_diffusion.conversion import convert_to_domain_folder
    from e4t_cli.models.domain_weights import DomainWeights
    from e4t_cli.registry.config import TuningConfig
    from e4t_cli.registry.domain import Domain

    config = TuningConfig(steps=2, base_learning_rate=1e-5, reg_weight=0.1, batch_size=4, mask=True)
    templates = ("{}", "a photo of {}")  # short: the tiny base reads 14 tokens
    domain = Domain(name="face", descriptor="face", tuning=config, prompt_templates=templates)
    request = conversion_request(read_checkpoint(checkpoint), domain, "face", "tiny")
    folder = tmp_path / "ours"
    folder.mkdir()
    result = convert_to_domain_folder(request, folder, read_pickled_tensors)
    return DomainWeights.load(folder), result, folder
