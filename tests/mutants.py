"""Mutation check of the method: small semantic faults, each of which some test has to notice.

    make mutants                          every fault, about ten minutes on two cores
    python -m tests.mutants 3 17          some of them
    python -m tests.mutants --list        what they are

A mutant is one replacement in one module. The tests named beside it run on a copy of the project
that contains it, and have to fail; a mutant that survives shows a property that no test holds.
`tests/unit/test_mutants.py`, part of the suite, checks that each replacement still applies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("src", "domains", "tests", "examples", "benchmarks", "mini_world", "pyproject.toml")
SECONDS = 300
"""After which a run of tests counts as failed: an endless loop is noticed, too."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        what: the fault in words.
        module: its path inside src/e4t_cli.
        old, new: the text that is replaced, which occurs once, and its replacement.
        tests: paths under tests/ and pytest options that have to notice it.
    """

    what: str
    module: str
    old: str
    new: str
    tests: str

    def apply(self, root: Path) -> None:
        """Write the fault into a copy of the project.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        path = root / "src" / "e4t_cli" / self.module
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.module} has {text.count(self.old)} times {self.old!r}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


OFFSETS = "invariants/test_offset_invariants.py"
ENCODER = "invariants/test_encoder_invariants.py"
TRAINING = "invariants/test_training_invariants.py invariants/test_mask_invariants.py"
EXAMPLE = "test_one_file_example.py"
PRETRAINING = "invariants/test_pretraining_invariants.py"
GENERATION = "invariants/test_generation_invariants.py"

MUTANTS = [
    Mutant("eq. 3 subtracts ΔW", "nn/weight_offsets.py", "1 + self.delta()", "1 - self.delta()", OFFSETS),
    Mutant("W_v is not modulated", "nn/weight_offsets.py", '"to_q", "to_k", "to_v"', '"to_q", "to_k"', OFFSETS),
    Mutant(
        "the linear over the columns is transposed",
        "nn/weight_offsets.py",
        "mixing.sum(dim=1)",
        "mixing.sum(dim=0)",
        OFFSETS,
    ),
    Mutant(
        "the bias of the linear over the rows is dropped",
        "nn/weight_offsets.py",
        "column_bias, torch.ones_like(column_bias)",
        "0 * column_bias, torch.ones_like(column_bias)",
        OFFSETS,
    ),
    Mutant("LeakyReLU becomes ReLU", "nn/word_embedding_encoder.py", "nn.LeakyReLU()", "nn.ReLU()", EXAMPLE),
    Mutant(
        "the average over the hierarchy forgets the U-Net's entries",
        "nn/word_embedding_encoder.py",
        "(len(self.image_linears) + len(self.unet_linears))",
        "len(self.image_linears)",
        EXAMPLE,
    ),
    Mutant(
        "[CLS] of every 2nd layer starts at the first",
        "nn/word_embedding_encoder.py",
        "range(1, len(visual.transformer.resblocks), 2)",
        "range(0, len(visual.transformer.resblocks), 2)",
        f"{ENCODER} {EXAMPLE}",
    ),
    Mutant(
        "[CLS] without the image encoder's final LayerNorm",
        "nn/word_embedding_encoder.py",
        "self.visual.ln_post(torch.cat(found, dim=1))",
        "torch.cat(found, dim=1)",
        EXAMPLE,
    ),
    Mutant(
        "CLIP's normalisation of pixels is left out",
        "nn/word_embedding_encoder.py",
        "- self.mean.float()) / self.std.float()",
        "- 0) / 1",
        f"{TRAINING} {EXAMPLE}",
    ),
    Mutant(
        "U-Net features without their LayerNorm",
        "nn/word_embedding_encoder.py",
        "functional.layer_norm(part, part.shape[-1:])",
        "part",
        EXAMPLE,
    ),
    Mutant(
        "the mid block's features are left out",
        "nn/unet.py",
        "(*state.skips, state.hidden)",
        "(*state.skips, state.skips[-1])",
        f"{ENCODER} {EXAMPLE}",
    ),
    Mutant(
        "features are maxima, not means",
        "nn/unet.py",
        ".mean(dim=(2, 3))",
        ".amax(dim=(2, 3))",
        f"{ENCODER} {EXAMPLE}",
    ),
    Mutant(
        "the loss ignores the mask",
        "training/loss.py",
        "    if mask is None:\n        return squared",
        "    if True:\n        return squared",
        TRAINING,
    ),
    Mutant(
        "tuning passes no mask on",
        "training/tuning.py",
        "mask=None if self.mask is None else self.mask[which]",
        "mask=None",
        TRAINING,
    ),
    Mutant(
        "the masked loss is not divided by the mask's area",
        "training/loss.py",
        "weight.sum(dim=(1, 2, 3)) * squared.shape[1]",
        "squared[0].numel()",
        TRAINING,
    ),
    Mutant("a mask of nothing masks everything", "training/loss.py", ">= MIN_MASK_AREA", ">= 0", TRAINING),
    Mutant(
        "eq. 2 is a mean", "training/loss.py", "offset.square().sum(dim=1)", "offset.square().mean(dim=1)", TRAINING
    ),
    Mutant("eq. 1 without s", "training/loss.py", "e_domain + scale * offset", "e_domain + offset", EXAMPLE),
    Mutant(
        "the U-Net reads another time step than the noise's",
        "training/loss.py",
        "embed_latents(unet, z_t, batch.timesteps)",
        "embed_latents(unet, z_t, batch.timesteps.flip(0))",
        EXAMPLE,
    ),
    Mutant(
        "micro-batches are added without their share",
        "training/tuning.py",
        "share = len(batch.timesteps) / self.config.batch_size",
        "share = 1.0",
        TRAINING,
    ),
    Mutant(
        "tuning trains on the posterior's mean",
        "training/tuning.py",
        "self.posterior[which].sample(posterior)",
        "self.posterior[which].sample(0 * posterior)",
        EXAMPLE,
    ),
    Mutant(
        "every sample of a batch has the prompt of the first",
        "training/tuning.py",
        "tokens=self.tokens[prompts]",
        "tokens=self.tokens[prompts[:1].expand_as(prompts)]",
        EXAMPLE,
    ),
    Mutant(
        "L_reg has no weight in tuning",
        "training/tuning.py",
        "losses.total(self.config.reg_weight)",
        "losses.total(0.0)",
        f"{EXAMPLE} {TRAINING}",
    ),
    Mutant(
        "the gradient is not clipped",
        "training/optim.py",
        "nn.utils.clip_grad_norm_(self.params, max_norm,",
        "nn.utils.clip_grad_norm_(self.params, 1e9,",
        EXAMPLE,
    ),
    Mutant(
        "the offsets are not tuned",
        "training/trainable.py",
        "(list(self.offsets.parameters()), rate * config.offsets_rate)",
        "(list(self.offsets.parameters()), 0.0)",
        EXAMPLE,
    ),
    Mutant(
        "a whole batch has one noise level",
        "nn/randomness.py",
        "(torch.arange(batch_size) + values[:, 0]) / batch_size",
        "values[:1, 0].expand(batch_size)",
        "unit/test_randomness.py",
    ),
    Mutant(
        "the learning rate is not multiplied by the batch",
        "registry/config.py",
        "self.base_learning_rate * self.batch_size",
        "self.base_learning_rate",
        "domains/test_paper_numbers.py unit/test_domain.py",
    ),
    Mutant(
        "guidance starts from the conditional prediction",
        "models/denoiser.py",
        "guided = without + self.guidance",
        "guided = with_text + self.guidance",
        GENERATION,
    ),
    Mutant(
        "the embedding is predicted once, not at every step",
        "models/denoiser.py",
        "text = self.text if self.text is not None",
        "text = self.text = self.text if self.text is not None",
        f"{GENERATION} {EXAMPLE}",
    ),
    Mutant(
        "the concept scale leaves E as it is",
        "models/denoiser.py",
        "scale=self.scale * concept_scale",
        "scale=self.scale",
        GENERATION,
    ),
    Mutant("the first latents are not scaled", "sampling.py", " * scheduler.init_noise_sigma", "", GENERATION),
    Mutant(
        "latents are decoded without the VAE's factor",
        "models/text_to_image.py",
        'latents / self.vae.config["scaling_factor"]',
        "latents",
        EXAMPLE,
    ),
    Mutant("the VAE sees pixels in 0 … 1", "models/text_to_image.py", "/ 127.5 - 1", "/ 255", TRAINING),
    Mutant(
        "v-prediction is trained to predict noise",
        "models/text_to_image.py",
        '["prediction_type"] != "v_prediction"',
        '["prediction_type"] != "v"',
        TRAINING,
    ),
    Mutant(
        "every pre-training step repeats the draws of the first",
        "pretraining/batches.py",
        "self.seed, step, range(size)",
        "self.seed, 0, range(size)",
        PRETRAINING,
    ),
    Mutant(
        "every process trains on the same samples",
        "pretraining/batches.py",
        "range(self.rank * batch_size, (self.rank + 1) * batch_size)",
        "range(batch_size)",
        "pretraining/test_processes.py",
    ),
    Mutant(
        "L_reg has no weight in pre-training",
        "pretraining/loop.py",
        ".total(config.reg_weight)",
        ".total(0.0)",
        PRETRAINING,
    ),
]


def run(mutant: Mutant, root: Path) -> tuple[bool, float]:
    """Run a mutant's tests; returns whether they failed, and the seconds they took."""
    path = root / "src" / "e4t_cli" / mutant.module
    whole = path.read_text(encoding="utf-8")
    begun = time.monotonic()
    try:
        mutant.apply(root)
        words = [f"tests/{word}" if word.endswith(".py") else word for word in mutant.tests.split()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words],
            cwd=root,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(str(root / one) for one in ("src", "domains")),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            timeout=SECONDS,
        )
        failed = done.returncode == 1
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout.decode()[-2000:])
    except subprocess.TimeoutExpired:
        failed = True
    finally:
        path.write_text(whole, encoding="utf-8")
    return failed, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="some of them; all by default")
    parser.add_argument("--list", action="store_true", help="only print them")
    options = parser.parse_args()
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS, start=1)
        if not options.numbers or number in options.numbers
    ]
    if options.list:
        for number, mutant in chosen:
            print(f"{number:2} {mutant.module:32} {mutant.what}")
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, root / name, ignore=ignored)
            else:
                shutil.copy(source, root / name)
        for number, mutant in chosen:
            killed, seconds = run(mutant, root)
            survived += not killed
            state = "killed" if killed else "SURVIVED"
            print(f"{number:2} {state:8} {seconds:5.0f} s  {mutant.module:32} {mutant.what}")
            sys.stdout.flush()
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
