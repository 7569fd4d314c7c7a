"""The next `mini`'s U-Net and folder: what is trained, and that other programs read the folder as it is meant."""

import copy
import json
import random

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.sampling import generate_latents, make_scheduler
from e4t_cli.schedulers import SCHEDULERS, SamplingConfig
from mini_world.next import base, loop
from mini_world.next.captions import write_caption
from mini_world.next.data import load_drawings
from mini_world.next.identities import ATTRIBUTES, draw_identity
from mini_world.next.latents import standardize_channels
from mini_world.next.loop import Unfinished
from mini_world.next.text import LENGTH, WIDTH, build_text_encoder, build_tokenizer, tokenize_drawings
from mini_world.next.world import Scene

SMALL_VAE = {
    "latent_channels": 8, "sample_size": 128, "layers_per_block": 1, "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4, "mid_block_add_attention": False, "scaling_factor": 0.8,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    for module in (base, loop):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("RANK", raising=False)


def awake_unet():
    """An untrained U-Net whose output depends on all of it; as built, residual branches and output are zero."""
    unet = base.build_unet()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    for name, weight in unet.named_parameters():
        if name.endswith("proj_out.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    return unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of untrained parts."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(path / "plain")
    parts = awake_unet(), AutoencoderKL(**SMALL_VAE), build_text_encoder(tokenizer).half(), tokenizer
    base.write_base(path / "mini", *parts, name="mini-next", revision="1")
    return path / "mini"


# The folder


def test_the_pipeline_reads_the_folder_without_options(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert part.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a face", num_inference_steps=1).images[0]
    assert image.size == (128, 128)


def test_the_pipeline_and_this_program_draw_the_same(folder):
    model, pipeline = TextToImageModel.load(folder), StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert (model.resolution, model.latent_shape) == (128, (8, 16, 16))
    for steps in (4, 9):
        sampling = SamplingConfig(steps=steps)
        assert make_scheduler(model, sampling).timesteps[0] == 999
        ours = generate_latents(model, TunedModel.plain(model, "face"), ["a face"], [3], sampling)
        theirs = pipeline(
            "a face", num_inference_steps=steps, guidance_scale=base.GUIDANCE,
            generator=torch.Generator().manual_seed(3), output_type="latent",
        ).images  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_every_scheduler_follows_the_base(folder):
    """Those that read another class's config take what it leaves out from their own defaults."""
    model = TextToImageModel.load(folder)
    z_0, epsilon = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in SCHEDULERS:
        scheduler = make_scheduler(model, SamplingConfig(steps=20, scheduler=name))
        z_t = model.add_noise(z_0, epsilon, torch.tensor([999]))
        if scheduler.init_noise_sigma > 2:
            z_t = z_t * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            # The noise that is right if the image is z_0: every scheduler has to end there.
            inputs = scheduler.scale_model_input(z_t, t)
            alpha = model.noise_schedule.alphas_cumprod[int(t)]
            z_t = scheduler.step((inputs - alpha.sqrt() * z_0) / (1 - alpha).sqrt(), t, z_t).prev_sample
        assert (z_t - z_0).abs().mean() < 0.15, name


def test_configs_are_strict_json_without_names_of_folders(folder):
    def refuse(constant):
        raise ValueError(constant)

    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(), parse_constant=refuse)
        assert "_name_or_path" not in config, path
        assert None not in config.values() or path.parent.name != "scheduler"


def test_the_text_encoder_is_float32_wherever_it_is_read(folder):
    assert json.loads((folder / "text_encoder/config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in load_file(folder / "text_encoder/model.safetensors").values()} == {torch.float32}
    assert CLIPTextModel.from_pretrained(folder / "text_encoder").dtype == torch.float32
    for part in ("unet", "vae"):
        assert "float16" not in (folder / part / "config.json").read_text()


def test_every_form_of_the_tokenizer_reads_captions_alike(folder):
    whole = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    files = {"vocab": str(folder / "tokenizer/vocab.json"), "merges": str(folder / "tokenizer/merges.txt")}
    plain, rng = CLIPTokenizer(**files), random.Random(1)
    assert whole.model_max_length == LENGTH
    for kind in ATTRIBUTES:
        for _ in range(20):
            text = write_caption(kind, draw_identity(kind, rng, held_out=False), Scene(), rng).text
            assert whole(text).input_ids == plain(text).input_ids
    for text in ("Quite, something ELSE!", "sks"):
        assert whole(text).input_ids == plain(text).input_ids


def test_the_base_is_named_and_lists_its_words(folder):
    found = TextToImageModel.load(folder).base
    assert (found.name, found.resolution, found.guidance) == ("mini-next", 128, base.GUIDANCE)
    assert found.drawing_limits == tuple(base.DRAWING_LIMITS)
    assert {"subjects", "places", "other"} <= json.loads((folder / "vocabulary.json").read_text()).keys()


def test_weights_fit_the_package(folder):
    sizes = {
        part: sum(path.stat().st_size for path in (folder / part).glob("*.safetensors"))
        for part in ("unet", "text_encoder")
    }
    assert sizes["unet"] < 15e6
    assert sizes["text_encoder"] < 7e6


# The U-Net


def test_eight_channels_cost_what_four_did():
    from mini_world.base import UNET_CONFIG as before

    def cost(config):
        unet = base.UNet2DConditionModel(**config).to("meta")
        inputs = torch.empty(1, config["in_channels"], 16, 16), torch.zeros(1), torch.empty(1, LENGTH, WIDTH)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(*(part.to("meta") for part in inputs))
        return counter.get_total_flops()

    assert cost(base.UNET_CONFIG) < 1.01 * cost(before)


def test_an_untrained_unet_predicts_nothing():
    with torch.no_grad():
        found = base.build_unet()(
            torch.randn(2, 8, 16, 16), torch.tensor([3, 900]), torch.randn(2, LENGTH, WIDTH)
        ).sample
    assert not found.any()


def test_subjects_count_twice():
    labels = numpy.zeros((3, 128, 128), numpy.uint8)
    labels[1] = base.SUBJECT_LABELS[0]
    labels[2, :64] = base.SUBJECT_LABELS[-1]
    weights = base.subject_weights(labels)
    assert weights.shape == (3, 16, 16)
    assert (weights[0] == 1).all() and (weights[1] == 2).all()
    assert (weights[2, :8] == 2).all() and (weights[2, 8:] == 1).all()


@pytest.fixture
def parts(tmp_path):
    drawings = load_drawings(tmp_path, "some", 6, seed=4, processes=1)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    return drawings, tokenizer, awake_unet(), build_text_encoder(tokenizer)


def train(folder, parts, **options):
    drawings, tokenizer, unet, text_encoder = parts
    settings = {"steps": 2, "learning_rate": 1e-3, "words_rate": 1e-3, "batch": 2, "captions_per_image": 2} | options
    encoded = torch.zeros(6, 16, 16, 16)
    base.train_unet(folder, unet, drawings, encoded, 1.0, tokenizer, text_encoder, **settings)
    return {name: weight.detach().clone() for name, weight in unet.named_parameters()}


@pytest.mark.parametrize("words_rate", [0.0, 1e-3])
def test_the_text_encoder_trains_with_the_unet_but_for_its_table(tmp_path, parts, words_rate):
    """The table of embeddings is never trained: personalization writes into it."""
    unet, text_encoder = parts[2:]
    before = {name: weight.detach().clone() for name, weight in text_encoder.named_parameters()}
    first = unet.conv_in.weight.detach().clone()
    train(tmp_path, parts, words_rate=words_rate)
    assert not torch.equal(unet.conv_in.weight, first)
    moved = {n for n, w in text_encoder.named_parameters() if not torch.equal(w, before[n])}
    layers = {name for name in before if "embedding" not in name}
    assert moved <= layers
    # A key's bias changes no softmax, so it may be left where it was.
    assert {name for name in layers if "k_proj.bias" not in name} <= moved or not words_rate
    assert bool(moved) == bool(words_rate)


def test_a_further_loss_of_the_text_encoder_is_minimized(tmp_path, parts):
    head = torch.nn.Linear(WIDTH, 1)
    seen = []

    def text_loss(encoder, generator):
        seen.append(float(torch.rand((), generator=generator)))
        hidden, _ = encoder(tokens)
        return {"words": head(hidden.float()).square().mean()}

    tokens = tokenize_drawings(parts[0], parts[1], 1)
    before = head.weight.detach().clone()
    train(tmp_path, parts, text_loss=text_loss, heads=head)
    assert len(set(seen)) == 2
    assert not torch.equal(head.weight, before)


def test_a_stopped_training_ends_as_an_unbroken_one(tmp_path, parts):
    whole = train(tmp_path / "whole", copy.deepcopy(parts))
    loop.limit_time(0)
    try:
        with pytest.raises(Unfinished):
            train(tmp_path / "broken", copy.deepcopy(parts))
    finally:
        loop.limit_time(None)
    broken = train(tmp_path / "broken", copy.deepcopy(parts))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_batch_is_split_among_processes(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(base, "process_rank", lambda: (0, 4))
    with pytest.raises(ValueError, match="a batch of 6 cannot be split among 4 processes"):
        train(tmp_path, parts, batch=6)


# The channels of latents


def test_standardized_channels_reconstruct_the_same():
    torch.manual_seed(1)
    vae = AutoencoderKL(**SMALL_VAE).eval()
    for bias in (vae.quant_conv.bias, vae.post_quant_conv.bias):
        torch.nn.init.normal_(bias)
    pixels = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        images = vae.decode(before.mean).sample
        noisy = vae.decode(before.mean + 0.7 * before.std).sample
        standardize_channels(vae, before.mean)
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(after.mean + 0.7 * after.std).sample, noisy, rtol=1e-4, atol=1e-4)
    assert vae.config.scaling_factor == 1.0
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(8), rtol=1e-4, atol=1e-4)


def test_a_constant_channel_is_refused():
    vae = AutoencoderKL(**SMALL_VAE)
    means = torch.randn(4, 8, 8, 8)
    means[:, 3] = 2.0
    before = vae.quant_conv.weight.clone()
    with pytest.raises(ValueError, match=r"channels \[3\]"):
        standardize_channels(vae, means)
    assert torch.equal(vae.quant_conv.weight, before)
