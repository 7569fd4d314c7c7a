"""Invariants of dtypes: one policy for a run, and an explicit fp32 is float32 everywhere."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from e4t_cli import devices
from e4t_cli.api.options import RunOptions
from e4t_cli.api.pretraining import PretrainingRun
from e4t_cli.api.session import Session
from e4t_cli.devices import limited_memory
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn import precision
from e4t_cli.nn.precision import PrecisionPolicy, math_attention, requested_autocast
from e4t_cli.pretraining.batches import PretrainingLoss
from e4t_cli.system_memory import GB
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def multiplies(monkeypatch):
    """What a CUDA device multiplies natively; the CPU here has bfloat16."""

    def those(bfloat16, float16):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: bfloat16 or device.type == "cpu")
        monkeypatch.setattr(precision, "multiplies_float16", lambda device: float16)

    return those


@pytest.mark.parametrize(
    ("device", "base", "autocast", "matmul", "sampled"),
    [
        (CUDA, BF16, None, BF16, FP16),
        (CUDA, FP32, None, BF16, FP32),
        (CUDA, BF16, False, FP32, FP16),
        (CUDA, FP32, False, FP32, FP32),
        (CPU, FP32, None, BF16, FP32),
        (CPU, BF16, False, FP32, BF16),
    ],
)
def test_a_policy_follows_from_device_dtype_and_autocast(multiplies, device, base, autocast, matmul, sampled):
    multiplies(bfloat16=True, float16=True)
    found = PrecisionPolicy.resolve(device, base, autocast)
    assert (found.matmul, found.sampled, found.vae, found.base) == (matmul, sampled, base, base)
    assert found.trained == FP32 and not found.scales_loss
    assert (found.half or FP32) == matmul


def test_pretraining_emulates_no_bfloat16_on_a_gpu_without_it(multiplies, monkeypatch):
    """It does not scale its loss, so that float16 will not do either."""
    from e4t_cli.pretraining import loop

    multiplies(bfloat16=False, float16=True)
    monkeypatch.setattr(loop, "pretrain_domain", lambda *args, options, **rest: options.autocast)

    def settings(device, dtype):
        run = object.__new__(PretrainingRun)
        run.session = Session(RunOptions(device=device.type, dtype=dtype))
        run.session.model = SimpleNamespace(device=device)
        run.domain = SimpleNamespace(name="face", descriptor="face", licence="", prompt_templates=("{}",))
        run.plan, run.processes = SimpleNamespace(config=None, tuning=None), None
        run.options = SimpleNamespace(micro_batch=None)
        return run.train(None, callbacks=None)

    assert settings(CUDA, "auto") is settings(CUDA, "bf16") is None
    assert settings(CUDA, "fp32") is settings(CPU, "auto") is False
    assert PrecisionPolicy.resolve(CUDA, FP16, None, loss_scaling=False).half is None
    assert PrecisionPolicy.resolve(CUDA, FP16, None).half == FP16
    multiplies(bfloat16=True, float16=True)
    assert PrecisionPolicy.resolve(CUDA, FP32, None, loss_scaling=False).half == BF16


@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_autocast_nothing_is_multiplied_in_half_precision(base_folder, domain_weights, face, method):
    """Also on a base in bfloat16, whose weights LoRA adapters would otherwise be applied to."""
    base = TextToImageModel.load(base_folder, dtype=BF16)
    run = Trainer(
        base, domain_weights, face, domain_weights.tuning.replace(method=method),
        options=TuningOptions(autocast=False, plan=Plan(micro_batch=2)),
    )  # fmt: skip
    found, plain = set(), functional.linear

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is plain and any(args[1] is weight for weight in unet):
                found.update((args[0].dtype, args[1].dtype))
            return func(*args, **(kwargs or {}))

    unet = list(run.unet.parameters())
    with Watching():
        run.gradients(0)
    assert {weight.dtype for weight in run.unet.parameters()} == {FP32}
    assert found == {FP32}
    assert {weight.dtype for weight in run.optimizer.weights} == {FP32}


def test_a_requested_fp32_is_float32_in_tuning(monkeypatch, model, domain_weights, face):
    from e4t_cli.training import tuning

    autocasts, concept = [], SimpleNamespace(
        config=domain_weights.tuning, photos=[face], seed=0, image_features=None
    )  # fmt: skip
    monkeypatch.setattr(tuning, "tune", lambda *args, options, **rest: autocasts.append(options.autocast))
    for dtype in ("fp32", "auto", "bf16"):
        session = Session(RunOptions(device="cpu", dtype=dtype))
        session.model, session.pretrained = model, domain_weights
        session.tune(concept)
    assert autocasts == [False, None, None]
    assert [requested_autocast(dtype) for dtype in ("fp32", "fp16")] == [False, None]


def test_an_objective_is_a_module(model, domain_weights):
    """`half` is a method of torch modules: the attribute for the dtype has another name."""
    objective = PretrainingLoss(
        model, model.unet, domain_weights.encoder, domain_weights.encoder, e_domain=torch.zeros(24), scale=1.0,
    )  # fmt: skip
    assert objective.half.__func__ is torch.nn.Module.half


# ── attention of one thread ──


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "float"])
def test_math_attention_is_the_math_backend_to_the_bit(kind, dtype, autocast):
    source = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 7, generator=source) > 0.3
    options = {
        "plain": {},
        "causal": {"is_causal": True, "scale": 0.3},
        "boolean": {"attn_mask": mask | torch.eye(7, dtype=torch.bool)},
        "float": {"attn_mask": torch.randn(7, 7, generator=source)},
    }[kind]
    if kind == "float" and autocast is None:
        options["attn_mask"] = options["attn_mask"].to(dtype)

    def attended(context):
        inputs = [
            torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)
        ]
        inputs = [one.requires_grad_(True) for one in inputs]
        cast = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
        with cast, context:
            output = functional.scaled_dot_product_attention(*inputs, **options)
        output.float().square().sum().backward()
        return [output, *(one.grad for one in inputs)]

    expected = attended(sdpa_kernel(SDPBackend.MATH))
    found = attended(math_attention())
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert all(map(torch.equal, found, expected))


def test_math_attention_is_that_of_its_thread():
    query = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))

    def attended():
        return functional.scaled_dot_product_attention(query, query, query)

    plain, found = attended(), []
    with math_attention():
        own = attended()
        assert torch.backends.cuda.flash_sdp_enabled()  # no flag of the process is touched
        thread = threading.Thread(target=lambda: found.append(attended()))
        thread.start()
        thread.join()
    assert not torch.equal(own, plain)  # otherwise this test could not fail
    assert torch.equal(found[0], plain) and torch.equal(attended(), plain)


# ── memory of one run ──


@pytest.fixture
def fraction(monkeypatch):
    """torch's limit of a GPU with 80 GB, as a dictionary."""
    found = {"now": 0.9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda x, device: found.update(now=x))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: found["now"])
    return found


def test_a_memory_limit_ends_with_its_run(fraction):
    with pytest.raises(KeyError), limited_memory(CUDA, "8"):
        assert fraction["now"] == 0.1
        raise KeyError
    assert fraction["now"] == 0.9
    with limited_memory(CUDA, "auto"), limited_memory(CPU, "8"), limited_memory(MPS, "8"):
        assert fraction["now"] == 0.9
    assert not devices._unlimited


def test_limits_that_overlap_end_in_any_order(fraction):
    first, second = limited_memory(CUDA, "8"), limited_memory(torch.device("cuda:0"), "16")
    with first:
        second.__enter__()
        assert fraction["now"] == pytest.approx(0.3)  # each may have its own
    assert fraction["now"] == pytest.approx(0.2)
    with limited_memory(CUDA, "100"):
        assert fraction["now"] == 1
    second.__exit__(None, None, None)
    assert fraction["now"] == 0.9
