"""A Stable Diffusion folder for other programs: names of weights, the word in prompts, the scheduler."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.formats.export_files import embedding_path
from e4t_cli.formats.stable_diffusion import write_folder
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import fetch_base
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.loading import load_part
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig

SPELLINGS = (
    *("S*", "s*", "of S* on", "S*, red", "S*'s hat", '"S*"', "(S*:1.2)", "S*-style"),
    *("aS*b", "S*x", "_S*", "éS*", "same"),
)
BESIDE_STARS = ("S**", "*S*")
"""Of which e4t says that it is not the concept; to tokenizers a star ends a word."""


def exported(model, folder, *, token="S*"):
    plain = TunedModel.plain(model, "face")
    write_folder(model, plain, plain.e_domain, folder, token=token, readme="", dtype=torch.float32)
    return folder


def pipeline_of(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, model, prompt, steps=4):
    """Return the latents that diffusers generates, of the noise that e4t begins with."""
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return pipeline(
        prompt, latents=noise, num_inference_steps=steps, guidance_scale=3.0, output_type="latent"
    ).images  # fmt: skip


def names_of(path):
    with safe_open(path, "pt") as stored:
        return set(stored.keys())


@pytest.fixture(scope="module")
def mini():
    return TextToImageModel.load(fetch_base("mini", HubAccess()))


# ── names and files ──


def test_weights_have_the_names_of_transformers_4(checked_base, tmp_path):
    model = TextToImageModel.load(checked_base)
    folder = exported(model, tmp_path / "me")
    names = names_of(folder / "text_encoder" / "model.safetensors")
    assert {name.partition(".")[0] for name in names} == {"text_model"}
    assert {name.removeprefix("text_model.") for name in names} == set(model.text_encoder.state_dict())
    checker = names_of(folder / "safety_checker" / "model.safetensors")
    assert {".".join(name.split(".")[:2]) for name in checker if "." in name} == {
        "vision_model.vision_model", "visual_projection.weight",
    }  # fmt: skip


@pytest.mark.parametrize("base", ["mini", "tiny"])
def test_the_files_of_a_slow_tokenizer(request, model, tmp_path, base):
    """The base of one has them, that of the other only tokenizer.json."""
    if base == "mini":
        model = request.getfixturevalue("mini")
    folder = exported(model, tmp_path / "me") / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == {word: number for word, number in model.tokenizer.get_vocab().items() if word in vocabulary}
    assert len(vocabulary) == len(model.tokenizer)
    first, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#version") and len(merges) > 30
    from_them = CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges])
    for prompt in ("a photo of a cat", "astronauts, 8k!", "Ünïcode 猫"):
        assert from_them(prompt).input_ids == model.tokenizer(prompt).input_ids


def test_a_folder_without_the_word(model, tmp_path):
    """For programs that expect a table of exactly as many tokens as the base has."""
    folder = exported(model, tmp_path / "me (1).v2", token=None)
    table = load_file(folder / "text_encoder" / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(table, model.text_encoder.get_input_embeddings().weight)
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"] == len(table)
    assert not (folder / "tokenizer" / "added_tokens.json").exists()
    assert CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab() == model.tokenizer.get_vocab()
    assert [path.name for path in folder.glob("*.safetensors")] == ["me-1-v2-word.safetensors"]


# ── the word ──


@pytest.mark.parametrize(
    ("file", "token"),
    [
        ("me.safetensors", "me-word"),
        ("My_face-2.safetensors", "My_face-2-word"),
        ("my photo.safetensors", "my-photo-word"),
        ("me(1).safetensors", "me-1-word"),
        ("a, b: [c].safetensors", "a-b-c-word"),
        ("me.v2.safetensors", "me-v2-word"),
        ("café.safetensors", "cafe-word"),
        ("猫.safetensors", "my-word"),
        ("folder", "folder-word"),
    ],
)
def test_the_file_of_the_word_is_a_name_that_prompts_can_have(file, token):
    assert embedding_path(Path("x") / file) == Path("x") / f"{token}.safetensors"


@pytest.mark.parametrize(
    ("placeholder", "prompts"),
    [
        ("S*", SPELLINGS),
        ("sam", ("sam", "Sam, smiling", "same", "samurai", "flotsam", "SAM's hat", "sam_1")),
        ("<me>", ("<me>", "a<me>b", "<ME>,", "me")),
    ],
)
def test_the_exported_tokenizer_finds_what_e4t_finds(model, tmp_path, placeholder, prompts):
    folder = exported(model, tmp_path / "me", token=placeholder) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    word = tokenizer.convert_tokens_to_ids(placeholder)
    assert word == len(model.tokenizer)
    found = {prompt: tokenizer(prompt).input_ids.count(word) for prompt in prompts}
    assert found == {
        prompt: parse_prompt(prompt, placeholder, require_placeholder=False).placeholders for prompt in prompts
    }
    assert set(found.values()) == {0, 1}


def test_where_they_differ(model, tmp_path):
    """docs/commands.md says so."""
    tokenizer = CLIPTokenizer.from_pretrained(exported(model, tmp_path / "me") / "tokenizer")
    for prompt in BESIDE_STARS:
        assert tokenizer.convert_tokens_to_ids("S*") in tokenizer(prompt).input_ids
        assert parse_prompt(prompt, require_placeholder=False).placeholders == 0


# ── beside transformers 4 ──

WITH_TRANSFORMERS_4 = """
import json, sys
import diffusers, torch, transformers

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
assert type(pipeline.tokenizer) is transformers.CLIPTokenizer  # the slow one
word = pipeline.tokenizer.convert_tokens_to_ids("S*")
ids = [pipeline.tokenizer(prompt).input_ids for prompt in prompts]
with torch.no_grad():
    hidden = [pipeline.text_encoder(torch.tensor([one])).last_hidden_state[0].tolist() for one in ids]
_, report = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", output_loading_info=True)
pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
seen = pipeline.safety_checker.vision_model(pixels).pooler_output[0].tolist() if pipeline.safety_checker else []
noise = torch.randn(1, *json.loads(sys.argv[3]), generator=torch.Generator().manual_seed(1))
drawn = pipeline(prompts[0], latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
record = {
    "version": transformers.__version__, "ids": ids, "found": [one.count(word) for one in ids], "hidden": hidden,
    "missing": list(report["missing_keys"]), "seen": seen, "drawn": drawn.tolist(),
}
print(json.dumps(record))
"""
"""A program for an older environment; it prints what it read, as JSON."""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """A folder with versions that many programs use, to be put before this environment's."""
    folder = tmp_path_factory.mktemp("transformers-4")
    packages = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub<1", "diffusers==0.35.2")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *packages], check=True
    )
    return folder


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("base", ["mini", "checked"])
def test_transformers_4_reads_the_same(request, transformers_4, checked_base, tmp_path, base):
    model = request.getfixturevalue("mini") if base == "mini" else TextToImageModel.load(checked_base)
    folder = exported(model, tmp_path / "me")
    prompts = ["S* on the beach", "a photo of a cat", "S*, red", "S*'s hat", "astronauts, 8k!", "s*"]
    program = [sys.executable, "-c", WITH_TRANSFORMERS_4, folder, json.dumps(prompts), json.dumps(model.latent_shape)]
    # Equal bits need the same number of threads.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(transformers_4), "OMP_NUM_THREADS": threads}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    record = json.loads(ended.stdout)
    assert record["version"] == "4.57.1" and record["missing"] == []
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    for prompt, ids, hidden in zip(prompts[:-1], record["ids"], record["hidden"], strict=False):
        assert ids == tokenizer(prompt).input_ids, prompt
        with torch.no_grad():
            own = encoder(torch.tensor([ids])).last_hidden_state[0]
        assert torch.equal(torch.tensor(hidden), own), prompt
    # Its tokenizer compares letters as they are; docs/commands.md says so.
    assert record["found"] == [1, 0, 1, 1, 0, 0]
    if base == "checked":
        checker = load_part(StableDiffusionSafetyChecker, checked_base / "safety_checker", "cpu", torch.float32)
        with torch.no_grad():
            seen = checker.vision_model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).pooler_output[0]
        torch.testing.assert_close(torch.tensor(record["seen"]), seen)
    torch.testing.assert_close(
        torch.tensor(record["drawn"]), drawn(pipeline_of(folder), model, prompts[0]), rtol=1e-3, atol=1e-4
    )


# ── the scheduler ──


def test_nothing_is_complained_of(mini, tmp_path, caplog, monkeypatch):
    """diffusers warns of a page about a scheduler with another offset, and of a checker that is missing."""
    monkeypatch.setattr(mini.noise_schedule, "_internal_dict", {**mini.noise_schedule.config, "clip_sample": True})
    folder = exported(mini, tmp_path / "me")
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error", FutureWarning)
        pipeline = pipeline_of(folder)
        assert drawn(pipeline, mini, "S* on the beach").isfinite().all()
    assert [record.message for record in caplog.records] == []
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert dict(pipeline.scheduler.config).items() >= {**written, "steps_offset": 1}.items()


@pytest.mark.parametrize("steps", [12, 20])
def test_diffusers_generates_what_e4t_generates_on_mini(mini, tmp_path, steps):
    """Its config has an offset of 0 in its time steps, which diffusers' pipelines take as 1."""
    assert json.loads((mini.base.folder / "scheduler" / "scheduler_config.json").read_text())["steps_offset"] == 0
    found = drawn(pipeline_of(exported(mini, tmp_path / "me")), mini, "S* on the beach", steps)
    sampling, prompt = SamplingConfig(steps=steps, guidance=3.0), parse_prompt("S* on the beach")
    own = generate_latents(mini, TunedModel.plain(mini, "face"), [prompt], [1], sampling)
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)
