"""Invariants of the word-embedding encoder and its U-Net features: section 3.1, eq. 1."""

import pytest
import torch
from test_offset_invariants import inputs

from e4t_cli.models.denoiser import TunedModel
from e4t_cli.nn.unet import (
    UNetState,
    check_unet,
    down_and_mid,
    embed_latents,
    feature_widths,
    pooled_features,
    up_and_out,
)
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, FixedEmbedding, WordEmbeddingEncoder
from e4t_cli.prompts import parse_prompt


def features(domain_weights, count=2):
    source = torch.Generator().manual_seed(5)
    config = domain_weights.encoder.config
    image = torch.randn(count, config.image_layers, config.image_width, generator=source)
    return image, torch.randn(count, sum(config.unet_widths), generator=source)


@torch.no_grad()
def test_the_three_pieces_are_the_unet_bit_for_bit(model):
    for count in (1, 2):
        z_t, t, text = inputs(count)
        state = down_and_mid(model.unet, embed_latents(model.unet, z_t, t), text)
        assert torch.equal(up_and_out(model.unet, state, text), model.unet(z_t, t, text).sample)
    odd = torch.randn(1, 4, 9, 7)
    state = down_and_mid(model.unet, embed_latents(model.unet, odd, t[:1]), text[:1])
    whole = model.unet(odd, t[:1], text[:1]).sample
    assert torch.equal(up_and_out(model.unet, state, text[:1]), whole)


@torch.no_grad()
def test_pooled_features_are_the_means_of_every_down_block(model):
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for module in (model.unet.conv_in, *model.unet.down_blocks, model.unet.mid_block)
    ]
    z_t, t, text = inputs()
    model.unet(z_t, t, text)
    for hook in hooks:
        hook.remove()
    maps = [seen[0], *(part for block in seen[1:-1] for part in block[1]), seen[-1]]
    expected = torch.cat([one.mean(dim=(2, 3)) for one in maps], dim=1)
    state = down_and_mid(model.unet, embed_latents(model.unet, z_t, t), text)
    assert torch.equal(pooled_features(state), expected)
    assert [one.shape[1] for one in maps] == list(feature_widths(model.unet))


@torch.no_grad()
def test_the_shared_feature_pass_is_the_separate_one(model):
    """With an empty negative prompt the unconditional down blocks are the feature pass."""
    z_t, t, text = inputs()
    unet, nothing = model.unet, model.uncond_embeds.expand(2, -1, -1)
    separate = pooled_features(down_and_mid(unet, embed_latents(unet, z_t, t), nothing))
    shared = down_and_mid(unet, embed_latents(unet, z_t, t), nothing)
    assert torch.equal(pooled_features(shared), separate)
    # And the unconditional output is that of the whole U-Net with the empty prompt.
    conditional = down_and_mid(unet, embed_latents(unet, z_t, t), text)
    both = up_and_out(unet, UNetState.cat((shared, conditional)), torch.cat((nothing, text))).chunk(2)
    torch.testing.assert_close(both[0], unet(z_t, t, nothing).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], unet(z_t, t, text).sample, rtol=1e-5, atol=1e-5)


def test_folded_image_features_equal_the_formula(domain_weights):
    image, unet = features(domain_weights)
    whole = domain_weights.encoder(image, unet)
    assert torch.equal(domain_weights.encoder.predict_offset(domain_weights.encoder.encode_image(image), unet), whole)
    # Against the formula of section 3.1, written out.
    parts = [torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in unet.split(
        domain_weights.encoder.config.unet_widths, dim=1)]  # fmt: skip
    entries = [linear(image[:, index]) for index, linear in enumerate(domain_weights.encoder.image_linears)] + [
        linear(part) for linear, part in zip(domain_weights.encoder.unet_linears, parts, strict=True)
    ]
    average = sum(entries) / len(entries)
    expected = domain_weights.encoder.final(torch.nn.functional.leaky_relu(average, 0.01))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_encoder_returns_the_descriptor_embedding(model):
    encoder = WordEmbeddingEncoder(model.encoder_config())
    token = model.descriptor_id("face")
    image, unet = torch.randn(1, 2, 32), torch.randn(3, sum(encoder.config.unet_widths))
    tuned = TunedModel(
        unet=model.unet,
        encoder=encoder,
        encoded_image=encoder.encode_image(image),
        e_domain=model.word_embedding(token),
        descriptor_id=token,
        scale=0.1,
    )
    e_c = tuned.embedding(unet)
    assert torch.equal(e_c, model.word_embedding(token).expand(3, -1))
    tokens = model.tokenize([parse_prompt("a photo of S* on the beach")] * 3, token)
    assert torch.equal(model.embed_prompts(tokens, e_c), model.embed_prompts(tokens))
    plain = model.tokenize(["a photo of face on the beach"], token)
    assert torch.equal(model.embed_prompts(tokens)[:1], model.embed_prompts(plain))


def test_equation_1(model, domain_weights):
    image, unet = features(domain_weights)
    tuned = TunedModel(
        unet=model.unet,
        encoder=domain_weights.encoder,
        encoded_image=domain_weights.encoder.encode_image(image[:1]),
        e_domain=model.word_embedding(7),
        descriptor_id=7,
        scale=0.1,
    )
    offset = domain_weights.encoder(image[:1].expand(2, -1, -1), unet)
    torch.testing.assert_close(tuned.embedding(unet), model.word_embedding(7) + 0.1 * offset)


def test_each_prompt_gets_its_own_embedding_at_the_placeholder_only(model):
    token = model.descriptor_id("face")
    tokens = model.tokenize([parse_prompt("S* with a dog"), parse_prompt("a photo of S*")], token)
    e_c = torch.randn(2, 24, requires_grad=True)
    seen = []
    table = model.text_encoder.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, inputs, output: seen.append(output))
    text = model.embed_prompts(tokens, e_c)
    hook.remove()
    # Hooks run in order: ours ran before the embedding was replaced.
    plain = seen[0]
    assert torch.equal(plain, table(tokens.ids))
    assert tokens.placeholder.sum(dim=1).tolist() == [1, 1]
    (gradient,) = torch.autograd.grad(text[0].sum(), e_c)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
    assert not model.text_encoder.get_input_embeddings()._forward_hooks


def test_an_encoder_without_unet_features(model):
    config = EncoderConfig(image_layers=2, image_width=32, unet_widths=(), hidden_width=32, embedding_width=24)
    encoder = WordEmbeddingEncoder(config)
    assert not encoder.reads_unet
    assert encoder(torch.randn(3, 2, 32), None).shape == (3, 24)
    assert EncoderConfig.from_dict(config.as_dict()) == config


def test_a_fixed_embedding_has_the_same_signature(domain_weights):
    offset = torch.randn(24)
    encoder = FixedEmbedding(offset)
    assert not encoder.reads_unet
    image, unet = features(domain_weights)
    found = encoder.predict_offset(encoder.encode_image(image), unet)
    assert torch.equal(found, offset.expand(2, -1))
    assert encoder.offset.requires_grad


@pytest.mark.parametrize("sizes", [{}, {"image_layers": "2"}, {"unet_widths": [0]}])
def test_wrong_sizes_are_refused(domain_weights, sizes):
    whole = {**domain_weights.encoder.config.as_dict(), **sizes} if sizes else {}
    with pytest.raises((TypeError, ValueError)):
        EncoderConfig.from_dict(whole)


@pytest.mark.parametrize(
    "change",
    [{"addition_embed_type": "text_time"}, {"in_channels": 9}, {"time_cond_proj_dim": 256}],
)
def test_other_kinds_of_unet_are_refused(model, change):
    class Other:
        config = {**model.unet.config, **change}

    Other.config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(Other.config)
    with pytest.raises(ValueError, match="its U-Net"):
        check_unet(Other)
