#!/usr/bin/env bash
# Versions: diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: each layer of a LoRA file in the kohya format carries its own `alpha`, and a reader multiplies that
# layer's up and down matrices by alpha / rank of that layer.
#
# Behaviour: diffusers reads the file into one peft adapter with the most frequent alpha, and lists the layers that
# deviate in `alpha_pattern`, under names of its older layout (`…attn2.processor.to_k_lora.down.weight`) that match
# no module. peft then ignores them, with a RuntimeWarning that shows only names. The layers
# get the scale common alpha / own rank: with alphas 4 and 2 at rank 4, half of the layers act at twice their
# strength; with ranks 4 and 8 and alpha = rank everywhere, which every reader should treat as scale 1, half
# of the layers act at half their strength. Equal alphas with unequal ranks are right.
#
# Output seen: see EXPECTED below: the factor by which each layer's change differs from up @ down * alpha / rank.
#
# Why it matters: LoRAs with a rank per layer (LoCon, resized LoRAs, compressed full fine-tunes) set alpha = rank
# as a matter of course, and draw another subject in diffusers than in other programs. When writing such a file,
# fold the scale into the matrices so that all alphas are equal; when reading one, apply it yourself.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 torch==2.14.1 numpy==2.4.6 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import itertools

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel


def small_unet():
    torch.manual_seed(0)
    widths = (32, 64, 64, 64)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8
    ).requires_grad_(False)


def factors(alphas, ranks):
    unet, file, expected = small_unet(), {}, {}
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_k"))]
    for name, alpha, rank in zip(names, itertools.cycle(alphas), itertools.cycle(ranks)):
        layer = unet.get_submodule(name)
        down = torch.randn(rank, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, rank, generator=generator)
        key = "lora_unet_" + name.replace(".", "_")
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(alpha))}
        expected[name] = up @ down * (alpha / rank)
    before = {name: unet.get_submodule(name).weight.clone() for name in names}
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"])
    pipeline = StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **nothing)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changes = {name: unet.get_submodule(name).weight - before[name] for name in names}
    found = (float((changes[name] * want).sum() / (want * want).sum()) for name, want in expected.items())
    return sorted({round(factor, 2) for factor in found})


print("alphas 4, ranks 4:      ", factors([4], [4]))
print("alphas 4, ranks 4 and 8:", factors([4], [4, 8]))
print("alphas 4 and 2, ranks 4:", factors([4, 2], [4]))
print("alpha = rank = 4 or 8:  ", factors([4, 8], [4, 8]))
PROBE

cat > "$work/expected" <<'EXPECTED'
alphas 4, ranks 4:       [1.0]
alphas 4, ranks 4 and 8: [1.0]
alphas 4 and 2, ranks 4: [1.0, 2.0]
alpha = rank = 4 or 8:   [0.5, 1.0]
EXPECTED

cd "$work"
venv/bin/python probe.py 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
