"""Invariants of memory: estimates match what autograd saves, and every plan gives one gradient."""

import math
import platform
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from e4t_cli.devices import budget_of, choose_device, choose_dtype
from e4t_cli.errors import ResourceError, UsageError
from e4t_cli.nn.adapters import attention_layers
from e4t_cli.nn.unet import down_and_mid, embed_latents, up_and_out
from e4t_cli.system_memory import GB, free_ram
from e4t_cli.training import memory as peaks
from e4t_cli.training import memory as planning
from e4t_cli.training import optim as optimizers
from e4t_cli.training.memory import CPU_BYTES, ActivationSizes, Plan, plan_tuning, predicted_peak
from e4t_cli.training.tuning import Trainer, TuningOptions, tune

SIZES = {
    "sd14": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "small": {
        "sample_size": 16, "cross_attention_dim": 160, "attention_head_dim": 4,
        "block_out_channels": (64, 128, 128), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs and its output. (The meta device has none.)"""

    @staticmethod
    def forward(context, query, key, value):
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output


def meta_unet(name):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SIZES[name])


def kept_numbers(unet, *, exact):
    """Count the values that autograd saves for one sample, on the meta device."""
    unet.requires_grad_(exact)
    for layer in attention_layers(unet).values():
        layer.requires_grad_(True)
    weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage, storage.nbytes() // 4  # held, so that no id returns
        return tensor

    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    z_t = torch.empty(1, 4, side, side, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    text = torch.empty(1, 77, width, device="meta", requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        state = embed_latents(unet, z_t, t)
        if exact:
            down_and_mid(unet, state, text)  # the feature pass
        up_and_out(unet, down_and_mid(unet, state, text), text)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_autograd_saves(name, method, checkpointing, monkeypatch):
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **_: FusedAttention.apply(q, k, v),
    )
    unet, exact = meta_unet(name), method == "full"
    if checkpointing:
        unet.enable_gradient_checkpointing()
    work = ActivationSizes.of(unet, unet.config.sample_size)
    coefficients = peaks.FULL if exact else peaks.LORA
    if checkpointing:
        coefficients = peaks.CHECKPOINTED
    passes = [work.whole, *([work.down] if exact else [])]
    predicted = sum(c * w for one in passes for c, w in zip(coefficients, one, strict=True))
    found = kept_numbers(unet, exact=exact)
    # Never too little by more than a tenth, which the allocator's share covers.
    assert 0.9 * found < predicted < 1.35 * found


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """SD 1.4 on the meta device, and domain weights for it."""
    from types import SimpleNamespace

    unet = meta_unet("sd14")
    sized = {"text_encoder": 123_060_480, "vae": 83_653_863}
    parts = {name: torch.nn.ParameterList([torch.empty(count, device="meta")]) for name, count in sized.items()}
    encoder = torch.nn.ParameterList([torch.empty(36_500_000, device="meta")])

    def model(device, dtype):
        return SimpleNamespace(unet=unet, device=torch.device(device), dtype=dtype, latent_shape=(4, 64, 64), **parts)

    return model, SimpleNamespace(encoder=encoder)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("vram", ["6", "8", "12", "16", "24", "80"])
def test_every_gpu_from_6_gigabytes_on_has_a_plan(stable_diffusion, domain_weights, method, vram):
    model, domain = stable_diffusion
    config = domain_weights.tuning.replace(batch_size=16, method=method)
    found = plan_tuning(
        model("cuda", torch.bfloat16), domain, config, vram=vram, consume=True,
        half=torch.bfloat16, ram=64 * GB,
    )  # fmt: skip
    assert 0 < found.peak <= found.budget < float(vram) * GB
    assert found.summary().startswith("memory: ")
    if vram == "80":
        assert found.micro_batch == 16 and not found.checkpointing
    if vram == "6" and method == "full":
        assert found.optimizer == "cpu"
    if method == "lora":
        assert found.optimizer == "fused"


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("kind", "device", "half"), [("accelerator", "cuda", torch.bfloat16), ("cpu", "cpu", None)])
def test_a_dry_run_tells_the_least_and_the_fastest(stable_diffusion, domain_weights, kind, device, half, method):
    from e4t_cli.api.plans import MEMORY

    model, domain = stable_diffusion
    config = domain_weights.tuning.replace(batch_size=16, method=method)
    peaks = [
        plan_tuning(
            model(device, half or torch.float32), domain, config, vram=vram, consume=True, half=half, ram=64 * GB
        )
        for vram in ("0.5", "1000")
    ]
    assert [round(one.peak / GB, 1) for one in peaks] == list(MEMORY[kind][method])


def test_an_optimizer_is_offloaded_only_if_main_memory_suffices(stable_diffusion, domain_weights):
    """A machine with a T4 of 15 GB often has 12 GB of main memory, where the system would kill the process."""
    model, domain = stable_diffusion
    config = domain_weights.tuning.replace(batch_size=16)

    def plan(device, ram, eight_bit=False, vram="15"):
        return plan_tuning(
            model(device, torch.float16), domain, config, vram=vram, consume=True,
            half=torch.float16, eight_bit=eight_bit, ram=ram * GB,
        )  # fmt: skip

    numbers = [
        one.numel() for part in (model("cuda", torch.float16).unet, domain.encoder) for one in part.parameters()
    ]
    assert 13 * GB < CPU_BYTES * sum(numbers) < 15 * GB
    roomy, tight, eight = plan("cuda", 32), plan("cuda", 12), plan("cuda", 12, eight_bit=True)
    assert roomy.optimizer == "cpu" and roomy.peak <= roomy.budget
    assert tight.optimizer == "fused" and tight.peak > tight.budget  # raised before it starts
    assert tight.micro_batch == 1 and tight.checkpointing
    assert eight.optimizer == "8bit" and eight.peak <= eight.budget
    # Apple's memory is unified: offloading to the CPU frees nothing.
    assert plan("mps", 16, vram="10").optimizer == "fused"
    assert plan("mps", 64, vram="10").optimizer == "cpu"


def test_a_full_size_rehearsal_fits_into_20_gigabytes_of_main_memory(stable_diffusion, domain_weights):
    """SD 1.4, full fine-tuning, in float32 on a CPU: possible because the base is consumed, not copied."""
    model, domain = stable_diffusion
    config = domain_weights.tuning.replace(batch_size=16)
    found, copied = (
        plan_tuning(model("cpu", torch.float32), domain, config, vram="20", consume=consume)
        for consume in (True, False)
    )
    assert found.checkpointing and found.peak < 18.4 * GB
    assert copied.peak > copied.budget  # as small as it gets


def test_plans_are_ordered_from_fast_to_small(stable_diffusion, domain_weights):
    model, domain = stable_diffusion
    config = domain_weights.tuning.replace(batch_size=16)
    on_card = model("cuda", torch.bfloat16)
    work = ActivationSizes.of(on_card.unet, 64)
    plans = list(planning._candidates(config, on_card.device, eight_bit=True))
    assert {plan.optimizer for plan in plans} == {"fused", "8bit", "cpu"}
    peaks = [predicted_peak(on_card, domain, config, plan, work, half=torch.bfloat16) for plan in plans]
    assert peaks[0] == max(peaks) and peaks[-1] == min(peaks)
    assert plans[0] == Plan(micro_batch=16)


def test_the_tiny_base_takes_its_whole_batch(model, domain_weights):
    assert plan_tuning(model, domain_weights, domain_weights.tuning).micro_batch == domain_weights.tuning.batch_size
    assert free_ram() > 0


@pytest.mark.parametrize("wrong", ["0", "a lot", "-8", "nan", "1e9"])
def test_invalid_budgets_are_refused(wrong):
    with pytest.raises(UsageError, match="gigabytes"):
        budget_of(wrong)
    assert budget_of("8") == 8 * GB


# ── every plan, the same result ──


@pytest.mark.parametrize(
    "plan",
    [
        Plan(micro_batch=1),
        Plan(micro_batch=2, checkpointing=True),
        Plan(micro_batch=4, vae_on_cpu=True),
        Plan(micro_batch=3, optimizer="cpu"),
    ],
)
def test_every_plan_tunes_to_the_same_model(model, domain_weights, face, plan):
    whole = tune(model, domain_weights, face, options=TuningOptions(autocast=False))
    other = tune(model, domain_weights, face, options=TuningOptions(autocast=False, plan=plan))
    for key, value in whole.unet.state_dict().items():
        torch.testing.assert_close(other.unet.state_dict()[key], value, rtol=0, atol=3e-5)
    assert model.vae.device == model.device


def test_recomputation_gives_the_same_bits_in_half_precision(model, domain_weights, face):
    """Attention too, whose kernel on a CPU is another one in bfloat16."""
    plan = Plan(micro_batch=8)
    once = tune(model, domain_weights, face, options=TuningOptions(autocast=True, plan=plan))
    twice = tune(
        model,
        domain_weights,
        face,
        options=TuningOptions(autocast=True, plan=plan.replace(checkpointing=True)),
    )
    for key, value in once.unet.state_dict().items():
        torch.testing.assert_close(twice.unet.state_dict()[key], value, rtol=0, atol=3e-4)


def test_a_consumed_model_gives_the_same_bits(base_folder, domain_weights, face):
    from e4t_cli.models.text_to_image import TextToImageModel

    one, other = (TextToImageModel.load(base_folder) for _ in range(2))
    copied = tune(one, domain_weights, face)
    consumed = tune(other, domain_weights, face, options=TuningOptions(consume=True))
    assert consumed.unet is other.unet
    assert copied.unet is not one.unet
    for key, value in copied.unet.state_dict().items():
        assert torch.equal(consumed.unet.state_dict()[key], value)


def weights(seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(5, 3, generator=source)) for _ in range(3)]


def walk(optimizer, own, steps=4, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for index, weight in enumerate(own):
            (weight.sin() * (step + index + 1)).sum().backward()
        norm = optimizer.step(1.0)
    optimizer.release()
    return norm


def test_offloaded_weights_keep_what_the_device_rounds(model, domain_weights, face):
    """With bfloat16 matrix multiplications the U-Net may be bfloat16 too: the tuned one is not."""
    plan = Plan(micro_batch=4, optimizer="cpu")
    offloaded = tune(model, domain_weights, face, options=TuningOptions(autocast=True, plan=plan))
    plain = tune(model, domain_weights, face, options=TuningOptions(autocast=True))
    start = tune(model, domain_weights, face, domain_weights.tuning.replace(steps=0)).unet.state_dict()
    moved = {
        name: torch.cat([(one.unet.state_dict()[key] - start[key]).flatten() for key in start])
        for name, one in (("host", offloaded), ("plain", plain))
    }
    assert {weight.dtype for weight in offloaded.unet.parameters()} == {torch.float32}
    assert torch.cosine_similarity(moved["host"], moved["plain"], dim=0) > 0.9


def test_the_optimizers_equal_torchs_adamw():
    reference = weights()
    theirs = torch.optim.AdamW(
        [{"params": reference[:2], "lr": 1e-2}, {"params": reference[2:], "lr": 1e-3}],
        weight_decay=optimizers.WEIGHT_DECAY,
    )
    for step in range(4):
        theirs.zero_grad()
        for index, weight in enumerate(reference):
            (weight.sin() * (step + index + 1)).sum().backward()
        torch.nn.utils.clip_grad_norm_(reference, 1.0)
        theirs.step()
    for kind in (optimizers.fused_adamw, optimizers.CPUOffloadedAdamW):
        own = weights()
        norm = walk(kind([(own[:2], 1e-2), (own[2:], 1e-3)]), own)
        assert math.isfinite(norm)
        for one, other in zip(own, reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_offloaded_optimizer_continues_from_the_devices_state():
    groups = lambda own: [(own, 1e-2)]  # noqa: E731
    straight, moved = weights(), weights()
    walk(optimizers.fused_adamw(groups(straight)), straight)
    first = optimizers.fused_adamw(groups(moved))
    first.release = lambda: first.zero_grad()
    walk(first, moved, steps=2)
    walk(optimizers.CPUOffloadedAdamW(groups(moved), after=first), moved, steps=2, start=2)
    for one, other in zip(straight, moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_half_precision_on_the_device_keeps_the_whole_delta_on_the_cpu():
    own, exact = weights(), weights()
    walk(optimizers.fused_adamw([(exact, 1e-6)]), exact)
    offloaded = optimizers.CPUOffloadedAdamW([(own, 1e-6)], own)
    assert {weight.dtype for weight in own} == {torch.bfloat16}
    before = [master.clone() for master in offloaded.params]
    walk(offloaded, own)
    for one, start, other, first in zip(own, before, exact, weights(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one - start, other - first, rtol=0.1, atol=2e-7)


def test_T4_memory_use_is_reduced_step_by_step_and_reported(model, domain_weights, face, monkeypatch):
    gradients, notes = Trainer.gradients, []

    def short_of_memory(self, step):
        if step == 1 and not self.unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("no more")
        return gradients(self, step)

    monkeypatch.setattr(Trainer, "gradients", short_of_memory)
    found = tune(
        model,
        domain_weights,
        face,
        on_progress=lambda event: event.note and notes.append(event.note),
        options=TuningOptions(autocast=False),
    )
    assert [note.split(": ")[1].split(" from")[0] for note in notes] == [
        "2 at a time", "1 at a time", "gradient checkpointing",
    ]  # fmt: skip
    monkeypatch.undo()
    plain = tune(model, domain_weights, face, options=TuningOptions(autocast=False))
    for key, value in plain.unet.state_dict().items():
        torch.testing.assert_close(found.unet.state_dict()[key], value, rtol=0, atol=3e-5)


def test_T4_without_a_smaller_plan_there_is_one_error(model, domain_weights, face, monkeypatch):
    def no_memory(self, step):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Trainer, "gradients", no_memory)
    with pytest.raises(ResourceError) as caught:
        tune(model, domain_weights, face)
    assert caught.value.exit_code == 6 and "--tuning lora" in caught.value.hint


# ── devices and dtypes ──


def test_T9_a_working_dtype_is_picked(tmp_path):
    cpu, gpu = choose_device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", cpu) is torch.float32
    assert choose_dtype("fp16", cpu) is torch.float16
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "small.safetensors").write_bytes(bytes(1000))
    assert choose_dtype("auto", gpu, tmp_path) is torch.float32
    with pytest.raises(UsageError, match="cannot be used"):
        choose_device("cuda:99")


@pytest.mark.parametrize(("native", "kind"), [(True, torch.bfloat16), (False, torch.float16)])
def test_T9_half_precision_by_what_the_gpu_multiplies(monkeypatch, native, kind):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_dtype("auto", torch.device("cuda")) is kind
    assert choose_dtype("auto", torch.device("mps")) is torch.float16


SCATTERED = """
import torch
from e4t_cli.devices import free_memory

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

torch.ones(6 << 20)  # freed: from now on blocks of that size come from the heap
blocks = [torch.ones(1 << 18) for _ in range(400)]  # 1 MB each
pins = blocks[9::10]
del blocks
before = resident()
free_memory(torch.device("cpu"))
print(before - resident(), sum(float(pin.sum()) for pin in pins))
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_memory_freed_between_live_blocks_is_returned_to_the_system():
    ran = subprocess.run([sys.executable, "-c", SCATTERED], capture_output=True, check=True)
    given_back, kept = map(float, ran.stdout.split())
    assert given_back > 300  # of the 360 MB that were freed
    assert kept == 40 * (1 << 18)
