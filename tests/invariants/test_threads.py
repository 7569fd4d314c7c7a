"""Invariants of threads: concurrent calls give bit for bit what they give one after the other."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.prompt_embedding import with_embedding
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig
from tests.threads import at_once, switch_often  # noqa: F401

THREADS = 3


pytestmark = pytest.mark.usefixtures("switch_often")


def assert_same_at_once(*works):
    expected = [work() for work in works]
    for found, tensors in zip(at_once(*works), expected, strict=True):
        assert len(found) == len(tensors)
        assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


@pytest.fixture
def models(model, base_folder):
    return {"shared": [model] * THREADS, "apart": [
        model, *(TextToImageModel.load(base_folder) for _ in range(THREADS - 1))
    ]}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("which", ["shared", "apart"])
def test_prompts_are_embedded_concurrently(models, which):
    def work(model, seed):
        prompts = [parse_prompt("a photo of S*"), parse_prompt("S* on the beach")]
        tokens = model.tokenize(prompts[: 1 + seed % 2], model.descriptor_id("face"))
        e_c = random(len(tokens.ids), 24, seed=seed)
        with torch.no_grad():
            return [model.embed_prompts(tokens, e_c + step) for step in range(60)]

    assert_same_at_once(*(lambda m=m, seed=seed: work(m, seed) for seed, m in enumerate(models[which])))


@pytest.mark.parametrize("which", ["shared", "apart"])
def test_concepts_are_sampled_concurrently(models, which, domain_weights):
    prompts = [parse_prompt("a photo of S*")]

    def tuned(model, seed):
        """Return a concept of its own on the U-Net of the base."""
        plain = TunedModel.plain(model, "face")
        if seed == 0:  # one with an embedding for all time steps
            return plain.with_fixed_embedding(random(24, seed=seed))
        encoder = copy.deepcopy(domain_weights.encoder).requires_grad_(False)
        image = encoder.encode_image(random(1, 2, 32, seed=seed)) * 5
        return TunedModel(
            unet=model.unet, encoder=encoder, encoded_image=image,
            e_domain=plain.e_domain, descriptor_id=plain.descriptor_id, scale=float(seed),
        )  # fmt: skip

    def work(model, concept, seed):
        model.__dict__.pop("uncond_embeds", None)  # computed again, by the first thread
        return [generate_latents(model, concept, prompts, [seed], SamplingConfig(steps=6)) for _ in range(2)]

    concepts = [(m, tuned(m, seed), seed) for seed, m in enumerate(models[which])]
    assert isinstance(concepts[0][1].encoder, FixedEmbedding)
    # Twice: what was computed in the first run is shared in the second.
    for _ in range(2):
        assert_same_at_once(*(lambda parts=parts: work(*parts) for parts in concepts))


def test_models_are_loaded_concurrently(base_folder):
    def work(dtype):
        model = TextToImageModel.load(base_folder, dtype=dtype)
        parts = (model.unet, model.vae, model.text_encoder)
        return [weight for part in parts for weight in part.parameters()]

    assert_same_at_once(*(lambda d=d: work(d) for d in (torch.float16, torch.float32) * 2))
    # What diffusers and transformers change while they load is as it was.
    assert torch.get_default_dtype() == torch.float32
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def trained(unet, offsets, seed):
    """Train offsets for some steps: two passes in each, of which the first fills the cache."""
    optimizer = torch.optim.SGD(offsets.parameters(), lr=0.1)
    z_t, text = random(1, 4, 8, 8, seed=seed), random(1, 16, 24, seed=seed)
    outputs = []
    for step in range(4):
        with offsets.cached():
            first = unet(z_t, step, text).sample
            second = unet(z_t, step + 1, text).sample
        optimizer.zero_grad()
        (first.square().mean() + second.square().mean()).backward()
        optimizer.step()
        outputs += [first.detach(), second.detach()]
        with torch.no_grad():  # outside of the block, with the new weights
            outputs.append(unet(z_t, step, text).sample)
    return [*outputs, *(weight.detach() for weight in offsets.parameters())]


def test_offsets_are_trained_concurrently(model, domain_weights):
    def work(seed):
        unet = copy.deepcopy(model.unet)
        offsets = WeightOffsets.from_factors(domain_weights.offsets)
        offsets.attach_to(unet)
        return trained(unet, offsets, seed)

    assert_same_at_once(*(lambda seed=seed: work(seed) for seed in range(THREADS)))


def test_offsets_of_one_unet_are_evaluated_concurrently(model, domain_weights):
    """One thread caches with a gradient, others do without either on the same U-Net."""
    unet = copy.deepcopy(model.unet)
    offsets = WeightOffsets.from_factors(domain_weights.offsets)
    offsets.attach_to(unet)

    def work(seed):
        z_t, text = random(1, 4, 8, 8, seed=seed), random(1, 16, 24, seed=seed)
        if seed:
            with torch.no_grad():
                return [unet(z_t, t, text).sample for t in range(20)]
        outputs = []
        for t in range(10):
            with offsets.cached():
                loss = unet(z_t, t, text).sample.mean() + unet(z_t, t + 1, text).sample.mean()
            outputs += [loss.detach(), *torch.autograd.grad(loss, list(offsets.parameters()))]
        return outputs

    assert_same_at_once(*(lambda seed=seed: work(seed) for seed in range(THREADS)))


def test_a_cache_ends_with_its_block_and_is_that_of_its_offsets(model, domain_weights):
    unets = [copy.deepcopy(model.unet) for _ in range(2)]
    both = [WeightOffsets.from_factors(domain_weights.offsets) for _ in range(2)]
    path, modulation = next(both[0]._items())
    other = next(both[1]._items())[1]
    for offsets, unet in zip(both, unets, strict=True):
        offsets.attach_to(unet)
    layers = [unet.get_submodule(path) for unet in unets]
    with both[0].cached():
        kept = layers[0].weight
        assert layers[0].weight is kept  # the graph is shared, too
        assert layers[1].weight is not layers[1].weight
        with both[1].cached():
            assert layers[0].weight is kept
            assert layers[1].weight is layers[1].weight
        with torch.no_grad():
            other.left.mul_(2)
        original = layers[1].parametrizations.weight.original
        assert torch.equal(layers[1].weight, other(original))
    with torch.no_grad():
        modulation.left.mul_(2)
    assert not torch.equal(layers[0].weight, kept)
    unets[0].enable_gradient_checkpointing()
    with both[0].cached():
        assert layers[0].weight is not layers[0].weight


CONFIG = {
    "vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 48,
    "eos_token_id": 49, "pad_token_id": 49, "projection_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_an_injected_embedding_is_a_hook_on_the_table(kind):
    """In both layouts of transformers: `embeddings` in the model itself, and in `text_model`."""
    torch.manual_seed(0)
    text_encoder = kind(CLIPTextConfig(**CONFIG)).eval().requires_grad_(False)
    ids = torch.tensor([[48, 3, 4, 49], [48, 5, 3, 49]])
    placeholder = ids == 3
    e_c = random(2, 8).requires_grad_(True)
    before = dict(text_encoder.named_modules())
    state = copy.deepcopy(text_encoder.state_dict())
    copied = with_embedding(text_encoder, placeholder, e_c)
    found = copied(ids).last_hidden_state
    table = text_encoder.get_input_embeddings()
    hook = table.register_forward_hook(
        lambda module, inputs, output: torch.where(placeholder[..., None], e_c[:, None], output)
    )
    expected = text_encoder(ids).last_hidden_state
    hook.remove()
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), e_c)[0] for x in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].any()
    # Nothing of the text encoder has changed, and the copy holds no other parameters.
    assert dict(text_encoder.named_modules()) == before
    assert all(torch.equal(state[key], value) for key, value in text_encoder.state_dict().items())
    assert {id(weight) for weight in copied.parameters()} == {id(weight) for weight in text_encoder.parameters()}
    assert isinstance(copied, kind) and isinstance(table, nn.Embedding)
