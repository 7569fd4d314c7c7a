"""Training steps, batch sizes and numbers of drawings of `make mini`: on a CPU, on a GPU, and for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is drawn and how long each network is trained.

    Batch sizes are those of all processes together, so that a run may be resumed with another number of processes.

    drawings: of the base, in pairs of one identity; latents: how many of them the U-Net is trained on; portraits: of each domain,
    for the encoder's pre-training; held_out: portraits of held-out identities; scenes: held-out drawings of every kind;
    judged: drawings of every kind for the judge, which shares none with the base, and a third as many of cats and styles;
    judged_old: drawings of the base of 64 pixels; captions: variants of the caption of a drawing; pairs: of drawings in a batch
    of the image tower.
    """

    name: str
    drawings: int
    latents: int
    portraits: dict[str, int]
    held_out: dict[str, int]
    scenes: int
    judged: int
    judged_old: int
    captions: int
    text: int
    text_batch: int
    text_captions: int  # random captions, of no drawings, that the text encoder is trained on
    tower: int
    pairs: int
    perceptual: int
    vae_crops: int  # steps on crops
    vae_wholes: int  # and then on whole drawings
    vae_batch: int
    decoder: int
    decoder_batch: int
    adversarial_from: int  # the decoder's step at which its discriminator starts
    unet: int
    unet_batch: int
    unet_rate: float = 1e-3
    words_rate: float = 2e-4  # of the text encoder's layers while the U-Net is trained
    parser: int
    judge: int
    domains: dict[str, int]  # steps of pre-training
    domain_batch: int
    evaluated: dict[str, int]  # held-out identities of each kind
    words: tuple[str, ...]  # the kinds for which every word of the base is drawn
    word_pictures: int  # of each word
    sampling_steps: int = 20


# Two cores, `--parallel 2`. CPU seconds a step on one core of an EPYC Zen 4 with bf16, shared with other programs: text .33,
# perceptual .3, VAE .45 on crops and .53 on whole drawings, tower .62, parser .16, decoder .44, judge .18, U-Net 1.36 for a whole
# batch, domains .54; .006 s a drawing, .008 s to encode it, .42 s to generate an image. So 3.0 hours for the VAE, 7.6 for the
# U-Net, 2.1 for 100 pictures of every word, and 17 for everything. On two cores it is 10: 4.2 until the U-Net begins, 3.8 for it,
# and 2.1 after it, as the words are drawn beside the domains and their evaluation.
CPU = TrainingPlan(
    name="cpu",
    drawings=60_000,
    latents=60_000,
    portraits={"face": 14_000, "cat": 7_000, "art": 6_000},
    held_out={"face": 600, "cat": 300, "art": 300},
    scenes=2000,
    judged=50_000,
    judged_old=6000,
    captions=8,
    text=4500,
    text_batch=128,
    text_captions=200_000,
    tower=4000,
    pairs=32,
    perceptual=1500,
    vae_crops=18_000,
    vae_wholes=5000,
    vae_batch=4,
    decoder=7000,
    decoder_batch=4,
    adversarial_from=2333,
    unet=20_000,
    unet_batch=64,
    parser=6000,
    judge=12_000,
    domains={"face": 1200, "cat": 800, "art": 700},
    domain_batch=32,
    evaluated={"face": 60, "cat": 40, "art": 20},
    words=("face", "cat", "dog", "art"),
    word_pictures=100,
)
# One H200-class GPU, meant for 10 minutes with the drawing on 16 cores and four stages at a time (`--parallel 4`). No run on a
# GPU has been made.
CUDA = TrainingPlan(
    name="cuda",
    drawings=60_000,
    latents=60_000,
    portraits=CPU.portraits,
    held_out=CPU.held_out,
    scenes=2000,
    judged=40_000,
    judged_old=6000,
    captions=8,
    text=1500,
    text_batch=256,
    text_captions=60_000,
    tower=1200,
    pairs=256,
    perceptual=1000,
    vae_crops=1500,
    vae_wholes=1000,
    vae_batch=32,
    decoder=1500,
    decoder_batch=32,
    adversarial_from=500,
    unet=2400,
    unet_batch=512,
    parser=2000,
    judge=4000,
    domains={"face": 800, "cat": 600, "art": 500},
    domain_batch=128,
    evaluated={"face": 60, "cat": 40, "art": 20},
    words=("face", "cat", "dog", "art"),
    word_pictures=100,
)
# A rehearsal of everything: nothing is learned.
TINY = TrainingPlan(
    name="tiny",
    drawings=96,
    latents=96,
    portraits={"face": 24, "cat": 16, "art": 16},
    held_out={"face": 12, "cat": 8, "art": 8},
    scenes=24,
    judged=48,
    judged_old=12,
    captions=2,
    text=4,
    text_batch=4,
    text_captions=64,
    tower=3,
    pairs=4,
    perceptual=3,
    vae_crops=3,
    vae_wholes=2,
    vae_batch=2,
    decoder=4,
    decoder_batch=2,
    adversarial_from=1,
    unet=6,
    unet_batch=4,
    parser=3,
    judge=3,
    domains={"face": 3, "cat": 2, "art": 2},
    domain_batch=4,
    evaluated={"face": 1, "cat": 1, "art": 1},
    words=("art",),
    word_pictures=1,
    sampling_steps=2,
)
PLANS = {plan.name: plan for plan in (CPU, CUDA, TINY)}


def training_plan(name: str = "") -> TrainingPlan:
    """The plan with this name, else the one for this machine."""
    if not name:
        import torch  # slow to import, and not needed for the rest

        name = "cuda" if torch.cuda.is_available() else "cpu"
    return PLANS[name]
