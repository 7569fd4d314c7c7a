"""A fake hub for each test, with caches of its own, and retries without waiting."""

from __future__ import annotations

import time

import pytest

from tests.hub.fake_hub import FakeHub
from tests.hub.repositories import safetensors_of, write_files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, to which this process and those it starts are connected."""
    from huggingface_hub import constants

    with FakeHub() as fake:
        for name, value in fake.environment(tmp_path / "cächés of mine").items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        # Read when huggingface_hub is imported, which may be long ago.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield fake


@pytest.fixture
def repository(hub, tmp_path):
    """ "owner/tiny" with a small text and a large file; returns the commit."""
    folder = write_files(
        tmp_path / "tiny",
        config_json=b'{"a": 1}',
        weights_safetensors=safetensors_of(300_000),
        code_py=b"raise SystemExit('never')",
    )
    return hub.add("owner/tiny", folder)
