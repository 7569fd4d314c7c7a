"""`e4t export`: other programs generate from the files what this one generates."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import e4t_cli
from e4t_cli import files
from e4t_cli.formats import stable_diffusion
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.stable_diffusion import write_folder
from e4t_cli.formats.textual_inversion import mean_concept_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.registry.discovery import user_domains_folder
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import TuningOptions, tune

SAMPLING = SamplingConfig(steps=12, guidance=3.0)  # fewer begin at another time step than a pipeline's


@pytest.fixture
def installed(world):
    """The tiny domain weights among the user domains."""
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")


@pytest.fixture
def saved(world, installed, tmp_path_factory):
    """A concept of the tiny world, in a file."""
    path = tmp_path_factory.mktemp("saved") / "me.e4t"
    made = e4t_cli.personalize(world.pack, world.photo, base=world.base, tune_steps=1, seed=4)
    made.concept.save(path)
    return path


def pipeline_of(place, **options):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(place, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tuned(model, domain_weights, face):
    return tune(
        model, domain_weights, face, domain_weights.tuning.replace(steps=1), options=TuningOptions(autocast=False)
    )


@pytest.mark.parametrize("prompt", ["{} on the beach", "a photo of {}", "{} and {} with hat"])
def test_another_program_generates_the_same(model, tuned, face, tmp_path, prompt):
    mean = mean_concept_embedding(model, tuned, face)
    write_folder(model, tuned, mean.embedding, tmp_path / "me", token="S*", readme="", dtype=torch.float32)
    pipeline = pipeline_of(tmp_path / "me")
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    found = pipeline(
        prompt.replace("{}", "S*"), latents=noise, num_inference_steps=SAMPLING.steps,
        guidance_scale=SAMPLING.guidance, output_type="latent",
    ).images  # fmt: skip
    without_time = tuned.with_fixed_embedding(mean.embedding)
    parsed = parse_prompt(prompt.replace("{}", "S*"))
    own = generate_latents(model, without_time, [parsed], [1], SAMPLING)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    plain = generate_latents(model, TunedModel.plain(model, "face"), [parsed], [1], SAMPLING)
    assert (own - plain).abs().max() > 1e-2  # and that is not what the base generates anyway


def test_the_embedding_is_the_mean_over_noise_levels(model, tuned, face):
    mean = mean_concept_embedding(model, tuned, face)
    assert mean.embedding.shape == tuned.e_domain.shape
    assert 0 < mean.variation < 10
    blind = TunedModel.plain(model, "face")
    assert torch.equal(mean_concept_embedding(model, blind, face).embedding, blind.e_domain)
    assert mean_concept_embedding(model, blind, face).variation == 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_command(run, world, installed, tmp_path, method):
    made = e4t_cli.personalize(
        world.pack,
        str(world.photo),
        base=world.base,
        tune_steps=1,
        tuning=method,
        keep_weights=True,
    )
    made.concept.save(tmp_path / "me.e4t")
    ended = run("export", "me.e4t", "models/me", "--base", str(world.base), "--placeholder", "<me>")
    assert ended.code == 0, ended.err
    assert ended.lines == ["models/me"]
    assert "in prompts it is <me>" in ended.err
    place = tmp_path / "models" / "me"
    pipeline = pipeline_of(place)
    assert "<me>" in pipeline.tokenizer.tokenize("a photo of <me> on the beach")
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}  # though the files are half as large
    stored = load_file(place / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    word = load_file(place / "learned_word.safetensors")["emb_params"]
    table = pipeline.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], word[0], rtol=1e-3, atol=1e-4)
    assert pipeline("<me> on the beach", num_inference_steps=2).images[0].size == (32, 32)
    # Nobody's folders are in it, and whoever may read one file may read all.
    for path in place.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode == (place / "README.md").stat().st_mode
            assert str(world.base).encode() not in path.read_bytes()
    assert "tiny that knows one face: <me>" in (place / "README.md").read_text()


def test_json_and_float32(run, world, saved):
    base = str(world.base)
    ended = run("export", str(saved), "me", "--base", base, "--json", "--dtype", "fp32")
    record = json.loads(ended.out)
    assert record["type"] == "model" and record["path"] == "me" and record["token"] == "S*"
    assert 0 <= record["variation"] < 10
    stored = load_file("me/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_a_folder_that_exists_is_left_alone(run, world, saved, tmp_path):
    (tmp_path / "mine").mkdir()
    ended = run("export", str(saved), "mine", "--base", str(world.base))
    assert ended.code == 2 and "exists already" in ended.err
    assert not any((tmp_path / "mine").iterdir())
    assert run("export", "nothing.e4t", "x").code == 2


def test_a_known_token_is_refused_before_tuning(run, world, saved):
    ended = run("export", str(saved), "me", "--base", str(world.base), "--placeholder", "face")
    assert ended.code == 2 and "a word of its own" in ended.err
    assert "tune" not in ended.err


def test_a_token_that_the_base_knows_is_refused(model, tuned, tmp_path):
    from e4t_cli.errors import UsageError

    known = model.tokenizer.convert_ids_to_tokens([5])[0]
    with pytest.raises(UsageError, match="a word of its own"):
        write_folder(model, tuned, tuned.e_domain, tmp_path / "me", token=known, readme="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "No space left on device"), 6), (KeyboardInterrupt(), 130)],
)
def test_it_appears_whole_or_not_at_all(run, world, saved, tmp_path, monkeypatch, error, code):
    def fails(*_):
        raise error

    monkeypatch.setattr(stable_diffusion, "_normalize", fails)
    ended = run("export", str(saved), "models/me", "--base", str(world.base))
    assert ended.code == code
    assert list((tmp_path / "models").iterdir()) == []


def test_a_full_disk_is_found_beforehand(run, world, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda place: 1000)
    ended = run("export", str(saved), "me", "--base", str(world.base))
    assert ended.code == 6 and "1 kB are free" in ended.err
    assert not Path("me").exists()


def test_the_safety_checker_goes_along(checked_base, domain_weights, face, tmp_path):
    base = TextToImageModel.load(checked_base)
    tuned = tune(base, domain_weights, face, domain_weights.tuning.replace(steps=0))
    write_folder(base, tuned, tuned.e_domain, tmp_path / "me", token="S*", readme="")
    pipeline = pipeline_of(tmp_path / "me")
    assert type(pipeline.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert pipeline.feature_extractor is not None


def test_the_base_stays_as_it_is(model, tuned, tmp_path):
    words, tokens = model.text_encoder.get_input_embeddings().weight.clone(), len(model.tokenizer)
    write_folder(model, tuned, tuned.e_domain, tmp_path / "me", token="S*", readme="")
    assert len(model.tokenizer) == tokens
    assert torch.equal(model.text_encoder.get_input_embeddings().weight, words)
    assert {weight.dtype for weight in tuned.unet.parameters()} == {torch.float32}


def test_a_concept_is_exported_from_python(world, saved, tmp_path):
    from e4t_cli.api.exporting import export

    made = export(Concept.load(saved), tmp_path / "me", base=world.base)
    assert made.path == tmp_path / "me" and made.token == "S*"
    assert (made.path / "model_index.json").is_file()


def test_a_single_file_is_for_stable_diffusion_1(run, world, saved, tmp_path, monkeypatch):
    ended = run("export", str(saved), "me.safetensors", "--base", str(world.base))
    assert ended.code == 2 and "another kind of model" in ended.err and "folder" in ended.err
    assert "tune" not in ended.err  # found out before
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_and_its_embedding(run, world, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "SINGLE_FILE_CONFIG", {})  # the tiny base's blocks have other names, too
    monkeypatch.setattr(stable_diffusion, "compvis_state_dict", lambda *parts: parts[0].state_dict().items())
    ended = run("export", str(saved), "models/me.safetensors", "--base", str(world.base), "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert record["path"] == "models/me.safetensors" and record["token"] == "me-word"
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert names == {"me.safetensors", "me-word.safetensors"}


def test_the_word_in_a_separate_file(run, world, saved, tmp_path):
    base = ("--base", str(world.base))
    ended = run("export", str(saved), "my model", "--word", "separate", *base)
    assert ended.code == 0, ended.err
    assert "in prompts it is my-model-word, in ComfyUI embedding:my-model-word" in ended.err
    pipeline = pipeline_of("my model")
    assert "load_textual_inversion" in Path("my model/README.md").read_text()
    before = pipeline.text_encoder.get_input_embeddings().num_embeddings
    pipeline.load_textual_inversion("my model/my-model-word.safetensors", token="my-model-word")
    assert pipeline.text_encoder.get_input_embeddings().num_embeddings == before + 1
    # The name of a file is the word in it; what else there is to choose is refused before anything is loaded.
    for options in (("other", "--word", "separate"), ("other.safetensors",), ("other.safetensors", "--lora", "4")):
        ended = run("export", str(saved), *options, "--placeholder", "<me>", *base)
        assert ended.code == 2 and "--placeholder" in ended.err
    ended = run("export", str(saved), "other", "--word", "beside", *base)
    assert ended.code == 2 and "included or separate" in ended.err


# ── a LoRA ──


def test_a_lora_by_the_command(run, world, saved, tmp_path):
    shutil.copy(saved, tmp_path / "me.e4t")
    base = ("--base", str(world.base))
    ended = run("export", "me.e4t", "me.safetensors", "--lora", "4", *base)
    assert ended.code == 0, ended.err
    assert ended.lines == ["me.safetensors"]
    assert "rank 4 holds" in ended.err and "in prompts it is me-word" in ended.err
    ended = run("export", "me.e4t", "other.safetensors", "--lora", "4", "--json", *base)
    record = json.loads(ended.out)
    assert record["type"] == "lora" and 0 < record["retained_energy"] < 1 and record["token"] == "other-word"
    first, again = load_file("me.safetensors"), load_file("other.safetensors")
    assert first.keys() == again.keys() and len(first) > 30
    # Neither what exists, nor a folder, nor a rank that is none.
    assert run("export", "me.e4t", "me.safetensors", "--lora", "4", *base).code == 2
    ended = run("export", "me.e4t", "me-lora", "--lora", "4", *base)
    assert ended.code == 2 and "call it me-lora.safetensors" in ended.err
    assert run("export", "me.e4t", "new.safetensors", "--lora", "0", *base).code == 2
    (tmp_path / "new-word.safetensors").write_bytes(b"mine")
    ended = run("export", "me.e4t", "new.safetensors", "--lora", "4", *base)
    assert ended.code == 2 and "tune" not in ended.err
    assert (tmp_path / "new-word.safetensors").read_bytes() == b"mine"


def test_the_base_is_still_there_to_be_compared_with(world, saved, tmp_path):
    """A base that was loaded for this alone is used up by tuning, but not here."""
    found = e4t_cli.export(saved, tmp_path / "me.safetensors", lora=4, base=world.base)
    assert found.retained_energy < 1  # compared with itself, nothing would be missing
    assert load_file(found.path)


@pytest.mark.parametrize("name", ["me.ckpt", "me.SAFETENSORS", "me.png", "me.e4t"])
def test_a_folder_is_not_called_as_a_file_is(run, tmp_path, name):
    with pytest.raises(e4t_cli.UsageError, match="a folder or a file that ends in .safetensors"):
        e4t_cli.export(tmp_path / "any.e4t", tmp_path / name)
