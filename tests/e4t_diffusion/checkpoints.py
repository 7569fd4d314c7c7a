"""A checkpoint of e4t-diffusion built by hand, and its formulas written down densely.

Everything here is plain torch on dictionaries of tensors: nothing of the package is used, so that
what it computes is compared with something else.
"""

import json

import torch
from torch.nn.functional import gelu, interpolate, layer_norm, leaky_relu, linear, softmax

TOWER = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
VECTORS = 9  # [CLS] and half of 16 patches
HIDDEN = 32


def random_values(source, *shape, scale=0.3, around=0.0):
    """Random values that half precision represents exactly."""
    return (around + torch.randn(shape, generator=source) * scale).half().float()


def layer(source, state, name, reads, writes, scale=0.3):
    state[f"{name}.weight"] = random_values(source, writes, reads, scale=scale)
    state[f"{name}.bias"] = random_values(source, writes, scale=scale)


def tower_state(source):
    width, patch, state = TOWER["width"], TOWER["patch_size"], {}
    patches = (TOWER["image_size"] // patch) ** 2
    state["class_embedding"] = random_values(source, width)
    state["positional_embedding"] = random_values(source, patches + 1, width)
    state["conv1.weight"] = random_values(source, width, 3, patch, patch, scale=0.1)
    for name in ("ln_pre", "ln_post"):
        state[f"{name}.weight"] = random_values(source, width, around=1.0)
        state[f"{name}.bias"] = random_values(source, width)
    for index in range(TOWER["layers"]):
        block = f"transformer.resblocks.{index}"
        for name in ("ln_1", "ln_2"):
            state[f"{block}.{name}.weight"] = random_values(source, width, around=1.0)
            state[f"{block}.{name}.bias"] = random_values(source, width)
        state[f"{block}.attn.in_proj_weight"] = random_values(source, 3 * width, width)
        state[f"{block}.attn.in_proj_bias"] = random_values(source, 3 * width)
        layer(source, state, f"{block}.attn.out_proj", width, width)
        layer(source, state, f"{block}.mlp.c_fc", width, 4 * width)
        layer(source, state, f"{block}.mlp.c_proj", 4 * width, width)
    return state


def encoder_state(unet_width, embedding_width, seed=0):
    """An encoder.pt: the layers by their names, and the tower without its projection."""
    source, state = torch.Generator().manual_seed(seed), {}
    layer(source, state, "unet_feature_embedder.0", unet_width, HIDDEN, scale=0.1)
    layer(source, state, "unet_feature_embedder.2", HIDDEN, HIDDEN)
    layer(source, state, "feature_linear", TOWER["width"] + HIDDEN, HIDDEN)
    for index in range(VECTORS):
        layer(source, state, f"first_linears.{index}", HIDDEN, HIDDEN)
    layer(source, state, "final_linear", HIDDEN, embedding_width)
    return state | {f"clip_vision.{key}": value for key, value in tower_state(source).items()}


def offsets_state(shapes, seed=1):
    """A weight_offsets.pt for projections path -> (out, in)."""
    source, state = torch.Generator().manual_seed(seed), {}
    for path, (out, into) in shapes.items():
        name = path.replace(".to_", ".wo_")
        state[f"{name}.v"] = random_values(source, 1, around=1.0)
        layer(source, state, f"{name}.linear1", 1, into)
        layer(source, state, f"{name}.linear2", 1, out)
        layer(source, state, f"{name}.linear_column", into, into, scale=0.1)
        layer(source, state, f"{name}.linear_row", out, out, scale=0.1)
    return state


def dense_offset(state, name):
    """ΔW (out, in), in the steps in which it is described."""
    w = {key.removeprefix(f"{name}."): v.double() for key, v in state.items() if name in key}
    p = linear(w["v"], w["linear1.weight"], w["linear1.bias"])
    q = linear(w["v"], w["linear2.weight"], w["linear2.bias"])
    m = p.unsqueeze(1) * q.unsqueeze(0)  # (in, out)
    m = linear(m.T, w["linear_column.weight"], w["linear_column.bias"]).T
    m = linear(m, w["linear_row.weight"], w["linear_row.bias"])
    return m.T


def dense_tower(state, pixels):
    """[CLS] after the last LayerNorm, and the patches before it."""
    w = {k.removeprefix("clip_vision."): v for k, v in state.items() if k.startswith("clip_")}
    w = {key: value.to(pixels.dtype) for key, value in w.items()}
    side, width = TOWER["image_size"], TOWER["width"]
    x = interpolate(pixels, size=(side, side), mode="bicubic", align_corners=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=x.dtype).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=x.dtype).view(1, 3, 1, 1)
    x = ((x + 1) / 2 - mean) / std
    x = torch.nn.functional.conv2d(x, w["conv1.weight"], stride=TOWER["patch_size"])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((w["class_embedding"].expand(len(x), 1, -1), x), dim=1)
    x = x + w["positional_embedding"]

    def norm(name, value):
        return layer_norm(value, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm("ln_pre", x)
    heads = width // TOWER["head_width"]
    for index in range(TOWER["layers"]):
        b = f"transformer.resblocks.{index}"
        qkv = linear(norm(f"{b}.ln_1", x), w[f"{b}.attn.in_proj_weight"], w[f"{b}.attn.in_proj_bias"])
        q, k, v = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in qkv.chunk(3, dim=2))
        scores = softmax(q @ k.transpose(2, 3) / TOWER["head_width"] ** 0.5, dim=3)
        seen = (scores @ v).transpose(1, 2).flatten(2)
        x = x + linear(seen, w[f"{b}.attn.out_proj.weight"], w[f"{b}.attn.out_proj.bias"])
        inner = gelu(linear(norm(f"{b}.ln_2", x), w[f"{b}.mlp.c_fc.weight"], w[f"{b}.mlp.c_fc.bias"]))
        x = x + linear(inner, w[f"{b}.mlp.c_proj.weight"], w[f"{b}.mlp.c_proj.bias"])
    return norm("ln_post", x[:, 0]), x[:, 1:]


def dense_encoder(state, pixels, unet_means):
    """E, vector by vector. `unet_means`: spatial means side by side (batch, unet_width)."""
    w = {key: value.to(pixels.dtype) for key, value in state.items()}

    def through(name, value):
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    unet = leaky_relu(through("unet_feature_embedder.0", unet_means))
    unet = through("unet_feature_embedder.2", unet)
    pooled, tokens = dense_tower(state, pixels)
    hierarchy = [pooled] + [tokens[:, index] for index in range(1, tokens.shape[1], 2)]
    assert len(hierarchy) == VECTORS
    outputs = []
    for index, vector in enumerate(hierarchy):
        joined = through("feature_linear", torch.cat((vector, unet), dim=1))
        outputs.append(through(f"first_linears.{index}", joined))
    mean = sum(outputs) / len(outputs)
    return through("final_linear", leaky_relu(mean))


def config(**more):
    return {
        "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4",
        "clip_model_name_or_path": "ViT-tiny::nobody",
        "placeholder_token": "*s",
        "domain_class_token": "face",
        "domain_embed_scale": 0.1,
        "reg_lambda": 0.01,
        "prompt_template": "face",
        **more,
    }


def write_checkpoint(folder, encoder, weights, settings=None, *, name="weight_offsets.pt"):
    """A folder as its training writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings or config()))
    torch.save(encoder, folder / "encoder.pt")
    torch.save(weights, folder / name)
    return folder


def write_open_clip_config(folder):
    """The config of the tiny visual tower, as open_clip writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": {}}
    (folder / "ViT-tiny.json").write_text(json.dumps(content))
    return folder
