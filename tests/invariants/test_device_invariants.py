"""Invariants of other devices, checked without one: no mixed devices, synchronisation or lost precision.

The meta device stands in for a GPU. It refuses to mix its tensors with the CPU's and to read a
value back, for which a GPU would synchronise; and float64 on it would fail on Apple's MPS.
"""

import copy
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e4t_cli.errors import DivergedError
from e4t_cli.formats.concept import Concept
from e4t_cli.models.denoiser import CFGDenoiser, TunedModel
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import attention_layers, frozen_copy
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.nn.randomness import draw
from e4t_cli.nn.unet import feature_widths
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import ImageTower
from e4t_cli.pretraining.batches import Batches, PretrainingLoss
from e4t_cli.pretraining.encoded_images import EncodedImages
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents, sample
from e4t_cli.schedulers import SCHEDULERS, SamplingConfig
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions, tune
from tests.pretraining.conftest import pretrain_domain_with

THERE = torch.device("meta")
PROMPTS = [parse_prompt("S* on the beach"), parse_prompt("a photo of S*")]


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor) and one.device == THERE:
                assert one.dtype != torch.float64, f"{function} is in float64"
        return found


class ForbidCpuTensors(TorchDispatchMode):
    """What is captured on a GPU may neither read from main memory nor write there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, found)):
            if isinstance(one, torch.Tensor):
                assert one.device == THERE, f"{function} goes to {one.device}"
        return found


@pytest.fixture
def elsewhere(model):
    """The tiny base on the other device."""
    parts = {name: copy.deepcopy(getattr(model, name)).to(THERE) for name in ("unet", "vae", "text_encoder")}
    tower = model.image_tower
    return TextToImageModel(
        base=model.base, tokenizer=model.tokenizer,
        noise_schedule=copy.deepcopy(model.noise_schedule),  # its tables follow the noise
        image_tower=ImageTower(copy.deepcopy(tower.visual), (0.5,) * 3, (0.25,) * 3, 32).to(THERE),
        **parts,
    )  # fmt: skip


def public_encoder(model):
    """An encoder of e4t-diffusion's kind, and the image features that it takes."""
    config = PatchEncoderConfig(
        unet_width=sum(feature_widths(model.unet)), hidden_width=32, embedding_width=24,
        tower_width=32, tower_layers=4, tower_heads=2, tower_image_size=32, tower_patch_size=8,
    )  # fmt: skip
    return PatchEncoder(config), torch.zeros(config.vectors, 32)


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tuning_step_stays_on_its_device(elsewhere, domain_weights, face, method, public):
    config, seen = domain_weights.tuning.replace(method=method, mask=False), None
    if public:
        encoder, seen = public_encoder(elsewhere)
        domain_weights = dataclasses.replace(domain_weights, encoder=encoder)
    with NoFloat64():
        run = Trainer(
            elsewhere, domain_weights, face, config, 0, seen, options=TuningOptions(plan=Plan(micro_batch=2))
        )
        run.samples.mask = torch.ones(1, 8, 8, device=THERE)
        losses = run.gradients(0)
        norm = run.optimizer.step(config.gradient_clip)
    assert losses.device == norm.device == THERE
    assert all(weight.grad is not None for weight in run.optimizer.weights)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_captured_tuning_step_uses_no_cpu_tensor(elsewhere, domain_weights, face, method):
    config = domain_weights.tuning.replace(method=method, mask=False)
    run = Trainer(elsewhere, domain_weights, face, config, options=TuningOptions(plan=Plan(micro_batch=3)))
    samples = run.samples.of(0)
    run.accumulate(*samples)  # the warm-up: tables go to the device
    with ForbidCpuTensors():
        run.accumulate(*samples)
    with ForbidCpuTensors(), pytest.raises(AssertionError, match="goes to cpu"):
        run.samples.of(1)


@pytest.mark.parametrize("negative", ["", "a hat"])
def test_a_captured_sampling_step_uses_no_cpu_tensor(elsewhere, domain_weights, face, negative):
    tuned = Trainer(elsewhere, domain_weights, face, domain_weights.tuning.replace(steps=0, mask=False)).finish()
    predict = CFGDenoiser(
        elsewhere,
        tuned,
        elsewhere.tokenize(PROMPTS, tuned.descriptor_id),
        guidance=5.0,
        negative_prompt=negative,
    )
    z_t, t = torch.zeros(2, 4, 8, 8, device=THERE), torch.zeros((), device=THERE, dtype=torch.long)
    with torch.no_grad():
        predict(z_t, t)
        with ForbidCpuTensors():
            predict(z_t, t)


@pytest.mark.parametrize(("scheduler", "negative"), [*((name, "") for name in SCHEDULERS), ("dpm++", "a hat")])
def test_sampling_stays_on_its_device(elsewhere, domain_weights, face, scheduler, negative):
    tuned = Trainer(elsewhere, domain_weights, face, domain_weights.tuning.replace(steps=0, mask=False)).finish()
    steps = 16 if scheduler == "pndm" else 5
    sampling = SamplingConfig(steps=steps, scheduler=scheduler, negative_prompt=negative)
    with NoFloat64():
        assert generate_latents(elsewhere, tuned, PROMPTS, [1, 2], sampling).device == THERE


def test_a_pretraining_step_stays_on_its_device(elsewhere, domain_weights):
    data = EncodedImages(
        means=torch.zeros(6, 4, 8, 8), logvars=torch.zeros(6, 4, 8, 8),
        image_features=torch.zeros(6, 2, 32), masks=torch.ones(6, 8, 8),
    )  # fmt: skip
    config = domain_weights.pretraining.replace(mask=True)
    encoder, unet = copy.deepcopy(domain_weights.encoder).to(THERE), copy.deepcopy(elsewhere.unet)
    offsets = WeightOffsets.for_unet(unet).to(THERE)
    descriptor = elsewhere.descriptor_id("face")
    offsets.attach_to(unet)
    objective = PretrainingLoss(
        elsewhere, unet, encoder, offsets,
        e_domain=elsewhere.word_embedding(descriptor), scale=1.0,
    )  # fmt: skip
    with NoFloat64():
        batches = Batches(elsewhere, data, config, domain_weights.templates, descriptor, 0)
        objective(batches.of(0)).total(0.1).backward()
    assert all(weight.grad is not None for weight in objective.parameters())


def test_the_stand_in_detects_violations(model):
    """The check can fail."""
    draws = draw(0, 0, range(2), batch_size=2, train_timesteps=1000, shape=(4, 8, 8))
    with NoFloat64(), pytest.raises(AssertionError, match="float64"):
        draws.uniform.to(THERE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        draws.to(THERE).epsilon.mean().item()
    with pytest.raises(RuntimeError):
        draws.to(THERE).epsilon + draws.epsilon


# ── the dtype that a tuned U-Net is sampled in ──


def test_a_gpu_samples_a_tuned_model_in_float16():
    def on(device, dtype):
        model = SimpleNamespace(device=torch.device(device), dtype=dtype)
        return TextToImageModel.tuned_dtype.fget(model)

    for device in ("cuda", "mps"):
        assert on(device, torch.bfloat16) == on(device, torch.float16) == torch.float16
        assert on(device, torch.float32) == torch.float32
    assert on("cpu", torch.bfloat16) == torch.bfloat16


def sampled_in(dtype, monkeypatch):
    resolve = PrecisionPolicy.resolve.__func__

    def resolved(cls, *args, **options):
        return dataclasses.replace(resolve(cls, *args, **options), sampled=dtype)

    monkeypatch.setattr(PrecisionPolicy, "resolve", classmethod(resolved))


@pytest.fixture
def coarse(base_folder, monkeypatch):
    """The tiny base as it is kept on a GPU."""
    sampled_in(torch.float16, monkeypatch)
    return TextToImageModel.load(base_folder, dtype=torch.bfloat16)


def test_what_half_precision_keeps_of_a_tuning(coarse, domain_weights, face, monkeypatch):
    """Fifteen steps at the paper's rate: bfloat16 rounds a third of them away, float16 4 %."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights of Stable Diffusion's size
        for weight in coarse.unet.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=source) * 0.03)
    bare = dataclasses.replace(domain_weights, offsets={})
    config = domain_weights.tuning.replace(steps=15, base_learning_rate=1e-6, batch_size=16)
    lost = {}
    for dtype in (torch.float16, torch.bfloat16):
        sampled_in(dtype, monkeypatch)
        run = Trainer(coarse, bare, face, config)
        for step in range(run.steps):
            run.gradients(step)
            run.optimizer.step(config.gradient_clip)
        before = {name: weight.clone() for name, weight in run.unet.state_dict().items()}
        found = run.finish().unet.state_dict()
        error = change = 0.0
        for name, weight in coarse.unet.state_dict().items():
            if weight.dim() > 1:
                error += (found[name].float() - before[name]).square().sum().item()
                change += (before[name] - weight.float()).square().sum().item()
        lost[dtype] = (error / change) ** 0.5
    assert lost[torch.float16] < 0.05 < 0.25 < lost[torch.bfloat16]


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tuned_model_has_one_dtype_and_generates(coarse, domain_weights, face, method, consume):
    before = copy.deepcopy(coarse.unet)
    config = domain_weights.tuning.replace(method=method, steps=1)
    tuned = tune(coarse, domain_weights, face, config, seed=3, options=TuningOptions(autocast=True, consume=consume))
    assert {weight.dtype for weight in tuned.unet.parameters()} == {torch.float16}
    if consume:
        assert coarse.unet is tuned.unet  # nothing keeps a second one alive
    else:
        for name, weight in before.state_dict().items():
            assert torch.equal(coarse.unet.state_dict()[name], weight)
    few = SamplingConfig(steps=2)
    image = next(sample(coarse, tuned, PROMPTS, [1, 2], few))
    if consume:
        return
    concept = Concept(
        domain="face", descriptor="face", base_name="tiny", base_fingerprint=coarse.fingerprint,
        weights_digest="", prepared=face, config=config, seed=3, weights=Concept.weights_of(tuned),
        image_features=coarse.image_features(coarse.pixels([face.image]))[0],
    )  # fmt: skip
    again = concept.tuned(coarse, domain_weights)
    assert {weight.dtype for weight in again.unet.parameters()} == {torch.float16}
    assert next(sample(coarse, again, PROMPTS, [1, 2], few)).tobytes() == image.tobytes()


def test_an_image_that_is_not_finite_is_refused(model):
    latents = torch.zeros(1, *model.latent_shape)
    assert len(model.decode(latents)) == 1
    with pytest.raises(DivergedError) as caught:
        model.decode(latents * float("nan"))
    assert caught.value.exit_code == 7 and "--dtype fp32" in caught.value.hint


# ── memory that runs out ──

WORDS_FOR_IT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GiB, max allowed: 9.07 GiB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WORDS_FOR_IT, ids=lambda error: str(error)[:20])
def test_T4_tensors_of_a_failed_step_are_freed_before_the_retry(model, domain_weights, face, monkeypatch, error):
    gradients, reduce_memory, left = Trainer.gradients, Trainer.reduce_memory, []

    def short_of_memory(self, step):
        if self.plan.micro_batch > 1:
            activations = torch.zeros(3)
            left.append(weakref.ref(activations))
            raise copy.copy(error)
        return gradients(self, step)

    def reducing(self):
        assert left[-1]() is None
        return reduce_memory(self)

    monkeypatch.setattr(Trainer, "gradients", short_of_memory)
    monkeypatch.setattr(Trainer, "reduce_memory", reducing)
    tune(model, domain_weights, face, options=TuningOptions(autocast=False))
    assert len(left) == 2


@pytest.mark.parametrize("error", WORDS_FOR_IT, ids=lambda error: str(error)[:20])
def test_T4_tensors_of_a_failed_sampling_are_freed_before_the_retry(model, monkeypatch, error):
    from e4t_cli import sampling as loop

    denoise, free_memory, left = loop.denoise, loop.free_memory, []

    def short_of_memory(model, tuned, tokens, *rest):
        if len(tokens.ids) > 1:
            activations = torch.zeros(3)
            left.append(weakref.ref(activations))
            raise copy.copy(error)
        return denoise(model, tuned, tokens, *rest)

    def freeing(device):
        assert left[-1]() is None
        free_memory(device)

    monkeypatch.setattr(loop, "denoise", short_of_memory)
    monkeypatch.setattr(loop, "free_memory", freeing)
    plain = TunedModel.plain(model, "face")
    assert len(list(sample(model, plain, PROMPTS, [1, 2], SamplingConfig(steps=1), batch=2))) == 2
    assert len(left) == 1


def test_other_errors_are_not_taken_for_out_of_memory(model, domain_weights, face, monkeypatch):
    def broken(self, step):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "gradients", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        tune(model, domain_weights, face)


# ── a frozen base ──


@pytest.mark.parametrize("half", [torch.bfloat16, None])
def test_a_frozen_copy_owns_only_the_weights_it_changes(base_folder, domain_weights, half):
    base = TextToImageModel.load(base_folder, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    frozen = frozen_copy(base.unet, domain_weights.offsets, half)
    owned = {id(weight) for weight in frozen.parameters()} - {id(w) for w in base.unet.parameters()}
    if half is None:  # in float32: nothing can be shared
        assert {weight.dtype for weight in frozen.parameters()} == {torch.float32}
    else:
        assert owned == {id(layer.weight) for layer in attention_layers(frozen).values()}
    for name, weight in base.unet.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_base_in_bfloat16_is_pretrained_on_as_its_float32_copy_would_be(base_folder, domain_weights):
    """In half precision, matrix multiplications round W₀ · (1 + ΔW) anyway: a float32 copy of W₀ adds nothing."""
    data = EncodedImages(
        means=torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        logvars=torch.full((6, 4, 8, 8), -9.0),
        image_features=torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(1)),
    )
    half = TextToImageModel.load(base_folder, dtype=torch.bfloat16)
    whole = TextToImageModel.load(base_folder)
    with torch.no_grad():
        for name in ("unet", "text_encoder"):
            copied = getattr(half, name).state_dict()
            getattr(whole, name).load_state_dict(copied)

    def pretrained(base):
        return pretrain_domain_with(
            base, data, templates=domain_weights.templates, autocast=True,
            config=domain_weights.pretraining.replace(steps=3, base_learning_rate=1e-4), tuning=domain_weights.tuning,
        ).offsets  # fmt: skip

    found, expected = pretrained(half), pretrained(whole)
    error = change = 0.0
    for path, (left, right) in expected.items():
        delta, owned = left @ right, found[path][0] @ found[path][1]
        error += (owned - delta).square().sum().item()
        change += delta.square().sum().item()
    assert change > 0 and (error / change) ** 0.5 < 0.2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_weights_rounded_on_the_device_give_the_same_gradient(base_folder, domain_weights, face, kept, checkpointing):
    """With a CPU-offloaded optimizer; whatever dtype the rest of the base has."""

    def gradient(dtype, autocast, plan):
        base = TextToImageModel.load(base_folder, dtype=dtype)
        features = torch.ones(2, 32)
        run = Trainer(
            base,
            domain_weights,
            face,
            domain_weights.tuning,
            0,
            features,
            options=TuningOptions(autocast=autocast, plan=plan),
        )
        run.gradients(0)
        return torch.cat([one.flatten() for one in run.optimizer.gradients])

    whole = gradient(torch.float32, False, Plan(micro_batch=4))
    plan = Plan(micro_batch=2, checkpointing=checkpointing, optimizer="cpu")
    found = gradient(kept, True, plan)
    assert (found - whole).norm() / whole.norm() < 0.05
