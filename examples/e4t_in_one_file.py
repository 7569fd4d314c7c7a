"""E4T in one file: a few tuning steps on one photo, then one image of its subject.

    python examples/e4t_in_one_file.py examples/tiger.png "S* on the beach"

"Encoder-based Domain Tuning for Fast Personalization of Text-to-Image Models" (Gal et al., 2023) on
plain torch, diffusers, transformers and open_clip, on the CPU in float32. The base `mini` is a
small Stable Diffusion; encoder and weight offsets come pre-trained (section 3.3). Random numbers
are those of the package e4t, so that its `tune(autocast=False)` has the same losses.
`Paper silent:` marks a choice where the paper is silent, `Departure:` a deviation from it.
"""

import argparse
import hashlib
import sys
import tomllib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import DDPMScheduler, DPMSolverMultistepScheduler
from open_clip.transformer import VisionTransformer
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
BASE, PACKS = ROOT / "src/e4t_cli/models/mini", ROOT / "domains/e4t_domains/packs"
# The image tower of `mini`. It was trained with pixels in -1 … 1; others have a mean of their own.
TOWER = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 8, "heads": 4, "mlp_ratio": 4.0}
S = 0.1  # s of eq. 1
SAMPLING_STEPS, GUIDANCE = 20, 3.0  # Paper silent: what `mini` draws well with
CONCEPT = -1  # stands for S* among token ids


# ── Section 3.1: the encoder, the word embedding, the iterative refinement ──
class Encoder(nn.Module):
    """E(I_c): a linear layer per feature, average over the hierarchy, LeakyReLU, linear layer."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        # Paper silent: how U-Net features join the hierarchy. Here they are entries like [CLS].
        image, hidden = [sizes["image_width"]] * sizes["image_layers"], sizes["hidden_width"]
        self.image_linears = nn.ModuleList(nn.Linear(width, hidden) for width in image)
        self.unet_linears = nn.ModuleList(nn.Linear(w, hidden) for w in sizes["unet_widths"])
        self.final = nn.Linear(hidden, sizes["embedding_width"])

    def forward(self, cls_tokens: Tensor, unet_features: list[Tensor]) -> Tensor:
        # Paper silent: means over a map differ in size by orders of magnitude, hence a LayerNorm.
        normed = [functional.layer_norm(feature, feature.shape[-1:]) for feature in unet_features]
        linears, features = self.image_linears + self.unet_linears, [*cls_tokens.unbind(1), *normed]
        entries = [linear(feature) for linear, feature in zip(linears, features, strict=True)]
        return self.final(functional.leaky_relu(torch.stack(entries).mean(dim=0)))


def concept_embedding(e_domain: Tensor, offset: Tensor) -> Tensor:
    """Eq. 1: e_c = e_domain + s · E(I_c)."""
    return e_domain + S * offset


def run_with_outputs(parts: list[nn.Module], model: nn.Module, *inputs: Tensor) -> tuple:
    """Return what a model returns, and what each of its `parts` returned meanwhile, in order."""
    outputs = []
    hooks = [part.register_forward_hook(lambda *call: outputs.append(call[-1])) for part in parts]
    result = model(*inputs)
    for hook in hooks:
        hook.remove()
    return result, outputs


def image_features(tower: nn.Module, I_c: Tensor) -> Tensor:
    """Return the [CLS] token of each 2nd layer of the image tower, (batch, layers, width)."""
    _, tokens = run_with_outputs(tower.transformer.resblocks[1::2], tower, I_c)
    # Paper silent: through the tower's last LayerNorm, because [CLS] grows from layer to layer.
    return tower.ln_post(torch.stack([layer[:, 0] for layer in tokens], dim=1))


def denoise(unet: nn.Module, z_t: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return epsilon_theta(z_t, t, text) and the pooled features of the U-Net's encoder blocks."""
    parts = [unet.conv_in, *unet.down_blocks, unet.mid_block]
    # Paper silent: what a block is. Here: all skip connections (a down block's second output).
    prediction, (first, *down, middle) = run_with_outputs(parts, unet, z_t, t, text)
    maps = [first, *(skip for _, skips in down for skip in skips), middle]
    return prediction.sample, [feature_map.mean(dim=(2, 3)) for feature_map in maps]


# ── Section 3.2: weight offsets ──
class WeightOffset(nn.Module):
    """Eq. 3: W = W_0 · (1 + ΔW), element by element, for every W_q, W_k and W_v.

    Departure: the paper tunes the network that gives ΔW. Its linear layers act on the rows and
    columns of v_y · v_x, which with biases gives a ΔW of rank 3: here its two factors are tuned.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left.float()), nn.Parameter(right.float())

    def forward(self, W_0: Tensor) -> Tensor:
        return W_0 * (1 + self.left @ self.right)


# ── Sections 3.3 and 3.4: the loss, and what it is evaluated on ──
def diffusion_loss(epsilon: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Eq. 4: mean squared error; section 3.4: inside a mask."""
    # Paper silent: over the mask's area, so that the size of the concept changes nothing.
    return (mask * (epsilon - prediction).square()).mean() / mask.mean()


def regularization_loss(offset: Tensor) -> Tensor:
    """Eq. 2: ||E(I_c)||², of the encoder's output and not of e_c; mean over the batch."""
    return offset.square().sum(dim=1).mean()


def draw(seed: int, step: int, batch: int, levels: int, shape: list[int]) -> tuple[Tensor, ...]:
    """Return t, epsilon, noise for the VAE's posterior, and a number below 1 for each sample."""
    digest = hashlib.blake2b(f"{seed}/draw/{step}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    uniform = torch.rand(batch, 3, generator=source, dtype=torch.float64)
    # Paper silent: how t is drawn. Here sample k of n takes t from the k-th of n equal ranges.
    t = ((torch.arange(batch) + uniform[:, 0]) / batch * levels).long()
    epsilon, posterior_noise = torch.randn(2, batch, *shape, generator=source)
    return t, epsilon, posterior_noise, uniform[:, 1]


class E4T:
    """The base, and what pre-training on a domain gave for it (section 3.3)."""

    def __init__(self, base: Path, weights: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet")
        self.vae = AutoencoderKL.from_pretrained(base / "vae").requires_grad_(False)
        self.schedule = DDPMScheduler.from_pretrained(base / "scheduler", steps_offset=1)
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").float()
        self.text_encoder.requires_grad_(False)
        self.tower = VisionTransformer(**TOWER, output_dim=128).eval().requires_grad_(False)
        self.tower.load_state_dict(load_file(base / "image_tower/model.safetensors"))
        self.info = tomllib.loads((weights / "domain.toml").read_text(encoding="utf-8"))
        self.encoder = Encoder(self.info["encoder"])
        self.encoder.load_state_dict(load_file(weights / "encoder.safetensors"))
        factors = load_file(weights / "offsets.safetensors")
        for path in sorted({name.rpartition(".")[0] for name in factors}):  # such as …attn1.to_q
            offset = WeightOffset(factors[f"{path}.left"], factors[f"{path}.right"])
            parametrize.register_parametrization(self.unet.get_submodule(path), "weight", offset)
        self.images = VaeImageProcessor()  # to -1 … 1 and back; masks: to 0 … 1
        self.masks = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True)
        self.shape = [self.unet.config.in_channels, *[self.unet.config.sample_size] * 2]
        (self.word,) = self.tokenizer(self.info["descriptor"], add_special_tokens=False).input_ids
        self.e_domain = self.text_encoder.get_input_embeddings().weight[self.word]
        self.empty_text = self.encode_text(self.tokenize([""]), self.e_domain[None])

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids with CONCEPT at each S*, (batch, length)."""
        length, rows = self.text_encoder.config.max_position_embeddings, []
        for prompt in prompts:
            first, *others = self.tokenizer(prompt.split("S*"), add_special_tokens=False).input_ids
            words = first + [token for part in others for token in (CONCEPT, *part)]
            row = [self.tokenizer.bos_token_id, *words[: length - 2], self.tokenizer.eos_token_id]
            rows.append(row + [self.tokenizer.pad_token_id] * (length - len(row)))
        return torch.tensor(rows)

    def encode_text(self, ids: Tensor, e_c: Tensor) -> Tensor:
        """Run the frozen text encoder with e_c, (batch, width), as the word embedding of S*."""
        concept = ids == CONCEPT
        # A hook, because each prompt has an e_c of its own and gradients have to reach it.
        hook = self.text_encoder.get_input_embeddings().register_forward_hook(
            lambda table, inputs, words: torch.where(concept[..., None], e_c[:, None], words)
        )
        text = self.text_encoder(ids.masked_fill(concept, self.word)).last_hidden_state
        hook.remove()
        return text

    def tune(self, photo: Image.Image, mask: Image.Image | None, seed: int) -> list[list[float]]:
        """Tune encoder, offsets and U-Net on one photo; return eq. 5, 4 and 2 of each step."""
        # Departure: the config saved with these weights, for `mini`. The paper's: faces 15 steps,
        # lambda_r 0.1, cats 5 and 1e-4; base learning rate 3e-6, times the batch (section 3.5).
        # Paper silent: prompt templates (the domain's), AdamW with torch's defaults, clipping.
        config, history = self.info["tuning"], []
        batch, lambda_r = config["batch_size"], config["embedding_penalty"]  # "crucial": 16 or more
        I_c = self.images.preprocess(photo)
        self.cls_tokens = image_features(self.tower, I_c)
        posterior = self.vae.encode(I_c).latent_dist
        m = self.masks.preprocess(mask or Image.new("L", photo.size, "white"))
        # Paper silent: the mask is scaled by area, so that what lies on its border counts in part.
        m = functional.adaptive_avg_pool2d(m, self.shape[1:])
        prompts = self.tokenize([text.replace("{}", "S*") for text in self.info["templates"]])
        trained = [*self.encoder.parameters(), *self.unet.parameters()]  # offsets are in the U-Net
        optimizer = torch.optim.AdamW(trained, config["base_learning_rate"] * batch)
        for step in range(config["steps"]):
            t, epsilon, noise, chosen = draw(seed, step, batch, len(self.schedule), self.shape)
            z_0 = (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor
            z_t = self.schedule.add_noise(z_0, epsilon, t)
            # Paper silent: the prompt of this pass (empty), whose weights run it (those in
            # training), and its gradient (kept: without it, it is not the gradient of eq. 5).
            _, features = denoise(self.unet, z_t, t, self.empty_text.expand(batch, -1, -1))
            offset = self.encoder(self.cls_tokens.expand(batch, -1, -1), features)
            e_c = concept_embedding(self.e_domain, offset)
            text = self.encode_text(prompts[(chosen * len(prompts)).long()], e_c)
            prediction, _ = denoise(self.unet, z_t, t, text)
            L_diffusion, L_reg = diffusion_loss(epsilon, prediction, m), regularization_loss(offset)
            L = L_diffusion + lambda_r * L_reg  # eq. 5
            optimizer.zero_grad()
            L.backward()
            nn.utils.clip_grad_norm_(trained, config["gradient_clip"])
            optimizer.step()
            history.append([L.item(), L_diffusion.item(), L_reg.item()])
            print(f"L {L:.5f} = {L_diffusion:.5f} + {lambda_r:g} · {L_reg:.3f}", file=sys.stderr)
        return history

    @torch.no_grad()
    @parametrize.cached()  # W is not computed again at every step
    def sample(self, prompt: str, seed: int) -> Image.Image:
        """Generate an image from noise; the embedding is predicted again at every step (fig. 2)."""
        scheduler = DPMSolverMultistepScheduler.from_config(self.schedule.config)
        scheduler.set_timesteps(SAMPLING_STEPS)
        ids = self.tokenize([prompt])
        z_t = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            # One pass serves both: guidance needs the prediction for the empty prompt, too.
            unconditional, features = denoise(self.unet, z_t, t, self.empty_text)
            e_c = concept_embedding(self.e_domain, self.encoder(self.cls_tokens, features))
            conditional, _ = denoise(self.unet, z_t, t, self.encode_text(ids, e_c))
            epsilon = unconditional + GUIDANCE * (conditional - unconditional)
            z_t = scheduler.step(epsilon, t, z_t).prev_sample
        decoded = self.vae.decode(z_t / self.vae.config.scaling_factor).sample
        return self.images.postprocess(decoded)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", type=Path, help="the centred square is used")
    parser.add_argument("prompt", help='for example "S* on the beach"')
    parser.add_argument("--domain", default="cat", choices=("cat", "face"))
    parser.add_argument("--mask", type=Path, help="white where the concept is, as large as photo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/one-file.png"))
    options = parser.parse_args()
    e4t = E4T(BASE, PACKS / options.domain / "mini")

    def square(path: Path) -> Image.Image:
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        return ImageOps.fit(upright, [e4t.vae.config.sample_size] * 2, Image.Resampling.LANCZOS)

    e4t.tune(square(options.photo), square(options.mask) if options.mask else None, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    e4t.sample(options.prompt, options.seed).save(options.output)
    print(options.output)
