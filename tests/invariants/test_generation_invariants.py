"""Invariants of sampling: section 3.1's refinement, and reproducibility from a seed."""

import copy
import random

import pytest
import torch

from e4t_cli import sampling as loop
from e4t_cli.errors import UsageError
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.nn.weight_offsets import FactoredWeightOffset, WeightOffset
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents, sample
from e4t_cli.schedulers import SCHEDULERS, SamplingConfig
from e4t_cli.training.tuning import tune

PROMPTS = [parse_prompt(text) for text in ("S* on the beach", "a photo of S*", "S* and S* with hat")]
FEW = SamplingConfig(steps=3)


@pytest.fixture
def tuned(model, domain_weights, face):
    return tune(model, domain_weights, face, domain_weights.tuning.replace(steps=1))


def pixels(images):
    return [image.tobytes() for image in images]


def test_the_same_seed_generates_the_same_pixels(model, tuned):
    one, other = (pixels(sample(model, tuned, PROMPTS, [1, 2, 3], FEW)) for _ in range(2))
    assert one == other
    assert one[0] != pixels(sample(model, tuned, PROMPTS[:1], [2], FEW))[0]


def test_an_image_is_the_same_alone_and_in_a_batch(model, tuned):
    together = pixels(sample(model, tuned, PROMPTS, [5, 6, 7], FEW))
    alone = [
        pixels(sample(model, tuned, [prompt], [seed], FEW))[0] for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)
    ]
    assert together == alone


VARIANTS = {
    "default": {},
    "no guidance": {"guidance": 1.0},
    "negative": {"negative_prompt": "red (hat:1.3)", "prompt_weights": True},
    "random": {"scheduler": "euler-a"},
    "second order": {"scheduler": "heun", "steps": 4},
    "weaker": {"concept_scale": 0.5},
}


@pytest.mark.parametrize(("variant", "method"), [("default", "lora"), *((name, "full") for name in VARIANTS)])
def test_an_image_is_the_same_in_any_company_and_order(model, domain_weights, face, variant, method):
    """Also at the last place of a chunk, beside copies, and beside prompts that have weights."""
    tuned = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=1, method=method))
    texts = ("S* on the beach", "a (photo:1.5) of S*", "S* and S* with hat", "a drawing of S*", "S*", "a cat, S*")
    wanted = [(parse_prompt(text), 7 * seed) for seed, text in enumerate(texts)]
    sampling = SamplingConfig(**{"steps": 2, **VARIANTS[variant]})

    def drawn(some):
        prompts, seeds = zip(*(wanted[index] for index in some), strict=True)
        return pixels(sample(model, tuned, prompts, seeds, sampling))

    alone = [drawn([index])[0] for index in range(len(wanted))]
    assert len(set(alone)) == len(wanted)
    chance = random.Random(1)
    for count in (6, 5, 4, 3, 2):
        some = chance.sample(range(len(wanted)), count)
        assert drawn(some) == [alone[index] for index in some]


def test_how_many_images_are_sampled_at_once(model, monkeypatch):
    assert loop.images_at_once(model) == loop.CHUNK
    monkeypatch.setattr(loop, "SMALL", 1000)  # as if it were Stable Diffusion: one by one
    assert loop.images_at_once(model) == 1
    monkeypatch.undo()
    monkeypatch.setattr(loop, "DECODED_PIXELS", 2 * model.resolution**2)
    assert loop.images_at_once(model) == 1


def test_the_last_chunk_is_filled_up_and_no_copy_is_decoded(model, tuned, monkeypatch):
    sizes, events, decoded, denoise, decode = [], [], [], loop.denoise, type(model).decode
    monkeypatch.setattr(loop, "denoise", lambda *all: sizes.append(len(all[2].ids)) or denoise(*all))
    monkeypatch.setattr(type(model), "decode", lambda self, z: decoded.append(len(z)) or decode(self, z))
    prompts = [PROMPTS[index % 3] for index in range(5)]
    images = sample(model, tuned, prompts, list(range(5)), FEW, on_progress=events.append)
    assert sizes == []
    next(images)
    assert sizes == [4]  # the first images are there before the last chunk begins
    assert len(list(images)) == 4 and sizes == [4, 4] and decoded == [1] * 5
    assert [event.done for event in events] == [4, 8, 12, 13, 14, 15]
    assert {event.total for event in events} == {15}


def test_a_batch_differs_by_rounding_only(model, tuned):
    whole = generate_latents(model, tuned, PROMPTS, [5, 6, 7], FEW)
    for index in range(3):
        one = generate_latents(model, tuned, PROMPTS[index : index + 1], [5 + index], FEW)
        torch.testing.assert_close(whole[index : index + 1], one, rtol=1e-3, atol=1e-3)


def test_images_are_yielded_one_by_one_with_progress(model, tuned):
    events = []
    images = sample(model, tuned, PROMPTS, [1, 2, 3], FEW, batch=1, on_progress=events.append)
    next(images)
    assert [event.done for event in events] == [1, 2, 3]
    list(images)
    assert [event.done for event in events] == list(range(1, 10))
    assert {event.total for event in events} == {9}
    events.clear()
    list(sample(model, tuned, PROMPTS, [1, 2, 3], FEW, batch=2, on_progress=events.append))
    assert [event.done for event in events] == [2, 4, 6, 7, 8, 9]


def test_the_embedding_is_predicted_again_at_every_step(model, tuned, monkeypatch):
    seen = []
    embedding = TunedModel.embedding
    monkeypatch.setattr(
        TunedModel,
        "embedding",
        lambda self, features: seen.append(embedding(self, features)) or seen[-1],
    )
    generate_latents(model, tuned, PROMPTS[:1], [1], FEW)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])


def test_sampling_evaluates_no_offset_and_no_image_encoder(model, tuned, monkeypatch):
    def never(*args):
        raise AssertionError("this was folded into constants")

    for kind in (WeightOffset, FactoredWeightOffset):
        monkeypatch.setattr(kind, "factors", never)
    monkeypatch.setattr(type(model.image_tower), "forward", never)
    monkeypatch.setattr(type(tuned.encoder), "encode_image", never)
    generate_latents(model, tuned, PROMPTS[:1], [1], FEW)


def test_features_and_unconditional_prediction_share_one_down_pass(model, tuned):
    calls = []
    hook = model.unet.mid_block.register_forward_hook(lambda *args: calls.append(1))
    tuned_hook = tuned.unet.mid_block.register_forward_hook(lambda *args: calls.append(1))
    counts = {}
    for name, sampling in {
        "shared": SamplingConfig(steps=1),
        "negative": SamplingConfig(steps=1, negative_prompt="a dog"),
        "no guidance": SamplingConfig(steps=1, guidance=1),
    }.items():
        calls.clear()
        generate_latents(model, tuned, PROMPTS[:1], [1], sampling)
        counts[name] = len(calls)
    calls.clear()
    generate_latents(model, TunedModel.plain(model, "face"), PROMPTS[:1], [1], SamplingConfig(steps=1))
    counts["plain word"] = len(calls)
    hook.remove()
    tuned_hook.remove()
    assert counts == {"shared": 2, "negative": 3, "no guidance": 2, "plain word": 2}


def test_an_empty_negative_prompt_in_words_is_the_shared_pass(model, tuned):
    """A separate feature pass, forced by an empty negative prompt, gives the same bits."""
    from e4t_cli.models.denoiser import CFGDenoiser

    shared = generate_latents(model, tuned, PROMPTS[:1], [1], FEW)
    original = CFGDenoiser.__init__

    def separate(self, *args, **options):
        original(self, *args, **options)
        self.negative = self.empty.clone()  # equal, but not the same: no sharing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CFGDenoiser, "__init__", separate)
        apart = generate_latents(model, tuned, PROMPTS[:1], [1], FEW)
    assert torch.equal(shared, apart)


@pytest.mark.parametrize("name", ["ddim", "euler"])  # euler scales the first latents and its inputs
def test_the_plain_word_is_plain_stable_diffusion(model, name):
    """Without refinement, our loop is diffusers' pipeline to the last bit of its latents."""
    from diffusers import StableDiffusionPipeline

    from e4t_cli.sampling import make_scheduler

    sampling = SamplingConfig(steps=6, guidance=4.0, scheduler=name)
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(model, sampling),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a photo of face",
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        height=32,
        width=32,
    ).images
    plain = TunedModel.plain(model, "face")
    found = generate_latents(model, plain, [parse_prompt("a photo of S*")], [11], sampling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*SCHEDULERS, "DEISMultistepScheduler"])
def test_any_scheduler_of_diffusers(model, tuned, name):
    sampling = SamplingConfig(steps=16 if name == "pndm" else 5, scheduler=name)
    one, other = (generate_latents(model, tuned, PROMPTS[:2], [1, 2], sampling) for _ in range(2))
    assert one.isfinite().all()
    assert torch.equal(one, other)


def test_negative_prompts_and_guidance_change_the_image(model, tuned):
    plain = generate_latents(model, tuned, PROMPTS[:1], [1], FEW)
    negative = generate_latents(model, tuned, PROMPTS[:1], [1], SamplingConfig(steps=3, negative_prompt="dog"))
    stronger = generate_latents(model, tuned, PROMPTS[:1], [1], SamplingConfig(steps=3, guidance=12.0))
    assert not torch.equal(plain, negative)
    assert not torch.equal(plain, stronger)


# ── concept scale ──


def test_scale_0_is_the_base_and_scale_1_the_tuned_model(model, tuned):
    assert tuned.at_concept_scale(model.unet, 1) is tuned
    none = generate_latents(model, tuned, PROMPTS[:1], [1], SamplingConfig(steps=3, concept_scale=0))
    plain = TunedModel.plain(model, tuned_descriptor(model, tuned))
    assert torch.equal(none, generate_latents(model, plain, PROMPTS[:1], [1], FEW))
    assert not torch.equal(none, generate_latents(model, tuned, PROMPTS[:1], [1], FEW))


def tuned_descriptor(model, tuned):
    return model.tokenizer.decode([tuned.descriptor_id]).strip()


@pytest.mark.parametrize("strength", [0.25, 1.5])
def test_weights_are_linear_in_the_concept_scale(model, tuned, strength):
    found = tuned.at_concept_scale(model.unet, strength)
    before = {name: weight.clone() for name, weight in tuned.unet.state_dict().items()}
    for name, weight in model.unet.state_dict().items():
        expected = weight + strength * (before[name] - weight)
        torch.testing.assert_close(found.unet.state_dict()[name], expected)
        assert torch.equal(tuned.unet.state_dict()[name], before[name])  # no other weight changed
    features = torch.randn(2, sum(tuned.encoder.config.unet_widths))
    offset = tuned.embedding(features) - tuned.e_domain
    torch.testing.assert_close(found.embedding(features) - found.e_domain, strength * offset)


def test_a_consumed_base_cannot_be_scaled(base_folder, domain_weights, face):
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.training.tuning import TuningOptions

    base = TextToImageModel.load(base_folder)
    config = domain_weights.tuning.replace(steps=1)
    consumed = tune(base, domain_weights, face, config, options=TuningOptions(consume=True))
    with pytest.raises(UsageError, match="base's U-Net"):
        sample(base, consumed, PROMPTS[:1], [1], SamplingConfig(steps=1, concept_scale=0.5))
    assert consumed.at_concept_scale(base.unet, 1) is consumed
    plain = TunedModel.plain(base, "face")
    assert plain.at_concept_scale(base.unet, 0.5) is plain


# ── bases that begin at pure noise ──


@pytest.fixture
def pure_noise(model, monkeypatch):
    from diffusers import DDPMScheduler

    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    monkeypatch.setattr(model, "noise_schedule", DDPMScheduler.from_config(model.noise_schedule.config, **changed))
    return model


def test_guidance_is_rescaled_where_a_base_begins_at_pure_noise(pure_noise, tuned, monkeypatch):
    """diffusers' pipeline with guidance_rescale 0.7 gives the same latents."""
    from diffusers import StableDiffusionPipeline

    from e4t_cli.sampling import make_scheduler

    model, sampling = pure_noise, SamplingConfig(steps=3, guidance=9.0, scheduler="ddim")
    pipeline = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=make_scheduler(model, sampling), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    plain, prompt = TunedModel.plain(model, "face"), [parse_prompt("a photo of S*")]
    found = generate_latents(model, plain, prompt, [11], sampling)

    def drawn(guidance_rescale):
        source = torch.Generator().manual_seed(11)
        return pipeline(
            "a photo of face", num_inference_steps=3, guidance_scale=9.0, guidance_rescale=guidance_rescale,
            generator=source, output_type="latent", height=32, width=32,
        ).images  # fmt: skip

    torch.testing.assert_close(found, drawn(0.7), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, drawn(0.0), rtol=1e-2, atol=1e-2)


def test_in_half_precision_it_is_rounded_once(model, tuned):
    half = TunedModel(**{**vars(tuned), "unet": copy.deepcopy(tuned.unet).half()})
    found = half.at_concept_scale(model.unet, 0.5).unet
    for (name, weight), before in zip(found.state_dict().items(), model.unet.state_dict().values(), strict=True):
        exact = torch.lerp(before, half.unet.state_dict()[name].float(), 0.5)
        assert torch.equal(weight, exact.half())


@pytest.mark.parametrize(
    "wrong",
    [{"concept_scale": -0.1}, {"concept_scale": 2.5}, {"concept_scale": float("nan")},
     {"steps": 0}, {"steps": 2.5}, {"guidance": -1.0}, {"guidance": float("nan")},
     {"scheduler": "magic"}, {"scheduler": "UNet2DConditionModel"}],
)  # fmt: skip
def test_invalid_sampling_configs_are_refused(wrong):
    with pytest.raises(UsageError):
        SamplingConfig(**wrong)


def test_an_invalid_prompt_stops_the_first_image(model, tuned):
    late = parse_prompt("a photo of the beach with an astronaut as art on the beach of the dog S*")
    with pytest.raises(UsageError, match="placeholder"):
        sample(model, tuned, [PROMPTS[0], late], [1, 2], FEW)


def test_T4_batches_are_reduced_when_memory_runs_out(model, tuned, monkeypatch):
    denoise, sizes, notes = loop.denoise, [], []

    def short_of_memory(model, tuned, tokens, *rest):
        sizes.append(len(tokens.ids))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no more")
        return denoise(model, tuned, tokens, *rest)

    monkeypatch.setattr(loop, "denoise", short_of_memory)
    found = pixels(
        sample(
            model, tuned, PROMPTS, [5, 6, 7], FEW, batch=3,
            on_progress=lambda event: event.note and notes.append(event.note),
        )
    )  # fmt: skip
    assert sizes == [3, 2, 1, 1, 1]
    assert len(notes) == 2
    monkeypatch.undo()
    assert found == pixels(sample(model, tuned, PROMPTS, [5, 6, 7], FEW, batch=1))
    monkeypatch.setattr(loop, "denoise", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        list(sample(model, tuned, PROMPTS[:1], [1], FEW))


def test_large_images_are_decoded_one_by_one(model, tuned, monkeypatch):
    from e4t_cli.models import text_to_image as home

    latents = generate_latents(model, tuned, PROMPTS, [1, 2, 3], FEW)
    together = pixels(model.decode(latents))
    monkeypatch.setattr(home, "DECODED_PIXELS", 1)
    sizes = []
    hook = model.vae.decoder.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    apart = pixels(model.decode(latents))
    hook.remove()
    assert sizes == [1, 1, 1]
    assert [len(one) for one in apart] == [len(one) for one in together]
