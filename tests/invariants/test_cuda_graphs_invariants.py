"""Invariants of CUDA graphs: a captured and replayed function gives the results of the function.

A CUDA graph runs the same kernels on the same addresses, without any Python in between.
The recorder here does the same on the CPU: it lists torch's operations with the tensors that they
read and wrote, and runs them again in order. A value that a step takes from Python and not from its
arguments stays what it was at capture, and gives other results than the step itself.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e4t_cli import sampling
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SCHEDULERS, SamplingConfig
from e4t_cli.training import cuda_graphs as recording
from e4t_cli.training import tuning
from e4t_cli.training.cuda_graphs import CudaGraphRunner
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import Trainer, TuningOptions, tune

HERE = torch.device("cpu")
PROMPTS = [parse_prompt("S* on the beach"), parse_prompt("a photo of S*")]
READS_BACK = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class OperationLog(TorchDispatchMode):
    """Lists operations and executes them, unlike a GPU, which only enqueues them during capture."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in READS_BACK:
            raise RuntimeError(f"operation not permitted when recording: {function}")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result


class CpuCapture:
    """A `Recorder` for the CPU."""

    def __init__(self):
        self.recorded = self.played = 0

    def warm_up(self, work):
        return work()

    def capture(self, work):
        with OperationLog() as log:
            result = work()
        for value in written(log.operations):
            if value.is_floating_point():
                value.fill_(float("nan"))  # as in a capture: no result exists yet
        self.recorded += 1
        return lambda: self.play(log.operations), result

    @torch.no_grad()
    def play(self, operations):
        self.played += 1
        for function, args, kwargs, result in operations:
            again = function(*args, **kwargs)
            for own, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(own) and own.data_ptr() != value.data_ptr():
                    own.detach().copy_(value)


def written(operations):
    """Yield the outputs of operations that are neither views nor changed in place."""
    for function, _, _, result in operations:
        if all(one.alias_info is None for one in function._schema.returns):
            yield from (one.detach() for one in tree_leaves(result) if torch.is_tensor(one))


def capture_with(monkeypatch, found):
    """Capture with `found`; None captures nothing."""
    monkeypatch.setattr(recording, "graph_capture_for", lambda device: found)
    for module in (sampling, tuning):
        monkeypatch.setattr(module, "captures_graphs", lambda device: found is not None)


@pytest.fixture
def cpu_capture(monkeypatch):
    """Capture everything, on the CPU."""
    found = CpuCapture()
    capture_with(monkeypatch, found)
    return found


def weights_of(tuned):
    return [
        *tuned.unet.state_dict().values(),
        *tuned.encoder.state_dict().values(),
        tuned.encoded_image,
    ]


# ── tuning and sampling ──


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_captured_tuning_gives_the_same_model(model, domain_weights, face, monkeypatch, method, micro_batch):
    config = domain_weights.tuning.replace(method=method, steps=6)

    def tuned():
        events = []
        found = tune(
            model,
            domain_weights,
            face,
            config,
            seed=3,
            on_progress=lambda progress: events.append(progress.values),
            options=TuningOptions(autocast=False, plan=Plan(micro_batch=micro_batch)),
        )
        return weights_of(found), events

    expected = tuned()
    found = CpuCapture()
    capture_with(monkeypatch, found)
    weights, events = tuned()
    assert (found.recorded, found.played) == (1, 5)
    assert events == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))


def test_captured_tuning_gives_the_same_model_in_half_precision(model, domain_weights, face, cpu_capture, monkeypatch):
    """With the casts of autocast, which are cached for the length of a step."""
    config = domain_weights.tuning.replace(steps=4)
    found = weights_of(tune(model, domain_weights, face, config, options=TuningOptions(autocast=True)))
    assert cpu_capture.played == 3
    capture_with(monkeypatch, None)
    expected = weights_of(tune(model, domain_weights, face, config, options=TuningOptions(autocast=True)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("scheduler", "negative"), [*((name, "") for name in SCHEDULERS), ("dpm++", "a hat")])
def test_captured_sampling_gives_the_same_images(model, domain_weights, face, monkeypatch, scheduler, negative):
    tuned = Trainer(model, domain_weights, face, domain_weights.tuning.replace(steps=0)).finish()
    steps = 16 if scheduler == "pndm" else 6
    sampling = SamplingConfig(steps=steps, scheduler=scheduler, negative_prompt=negative)
    expected = generate_latents(model, tuned, PROMPTS, [1, 2], sampling)
    found = CpuCapture()
    capture_with(monkeypatch, found)
    assert torch.equal(generate_latents(model, tuned, PROMPTS, [1, 2], sampling), expected)
    assert found.recorded == 1 and found.played >= 5


def test_a_changed_plan_is_captured_again(model, domain_weights, face, cpu_capture):
    run = Trainer(
        model, domain_weights, face, domain_weights.tuning.replace(steps=9), options=TuningOptions(autocast=False)
    )
    whole = [run.gradients(step) for step in range(3)]
    assert run.reduce_memory().startswith("memory ran out: 2 at a time")
    halves = [run.gradients(step) for step in range(3)]
    assert cpu_capture.recorded == 2
    for one, other in zip(whole, halves, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("plan", [{"checkpointing": True}, {"optimizer": "cpu"}])
def test_steps_that_vary_are_not_captured(model, domain_weights, face, cpu_capture, plan):
    tune(
        model,
        domain_weights,
        face,
        domain_weights.tuning.replace(steps=5),
        options=TuningOptions(plan=Plan(micro_batch=4, **plan)),
    )
    assert cpu_capture.recorded == 0


def test_few_steps_are_not_captured(model, domain_weights, face, cpu_capture):
    tune(model, domain_weights, face, domain_weights.tuning.replace(steps=3))
    assert cpu_capture.recorded == 0


# ── a capture by itself ──


def test_results_do_not_share_memory(cpu_capture):
    double = CudaGraphRunner(lambda x: 2 * x, HERE, calls=9)
    found = [double(torch.tensor([float(number)])) for number in range(5)]
    assert [one.item() for one in found] == [0, 2, 4, 6, 8]
    assert (cpu_capture.recorded, cpu_capture.played) == (1, 4)


def test_a_replay_reads_weights_changed_in_place(cpu_capture):
    weight = torch.ones(1)
    scaled = CudaGraphRunner(lambda x: weight * x, HERE, calls=9)
    for number in range(1, 5):
        assert scaled(torch.ones(1)).item() == number
        weight.add_(1)


def test_the_stand_in_detects_violations(cpu_capture):
    """The check can fail: Python values stay those of the capture."""
    count = 0

    def counted(x):
        nonlocal count
        count += 1
        return x + count

    recorded = CudaGraphRunner(counted, HERE, calls=9)
    assert [recorded(torch.zeros(1)).item() for _ in range(4)] == [1, 2, 2, 2]


def test_functions_that_cannot_be_captured_run_eagerly(cpu_capture):
    events = []

    def read_back(x):
        return x + 1 if x.sum().item() > 0 else x - 1

    work = CudaGraphRunner(read_back, HERE, calls=9, on_trouble=events.append)
    given = torch.tensor([1.0, -1.0, 2.0, -2.0])
    assert torch.cat([work(number) for number in given.split(1)]).tolist() == [2, -2, 3, -3]
    assert len(events) == 1 and "operation not permitted" in events[0]
    assert cpu_capture.played == 0


def test_a_tuning_that_cannot_be_captured_reports_it(model, domain_weights, face, cpu_capture, monkeypatch):
    def refuse(work):
        work()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    config, notes = domain_weights.tuning.replace(steps=5), []
    monkeypatch.setattr(cpu_capture, "capture", refuse)
    found = tune(model, domain_weights, face, config, on_progress=lambda progress: notes.append(progress.note))
    assert [note for note in notes if note] == [
        "no CUDA graph could be captured, steps run one by one: CUDA out of memory."
    ]
    capture_with(monkeypatch, None)
    expected = tune(model, domain_weights, face, config)
    assert all(map(torch.equal, weights_of(found), weights_of(expected)))


def test_nothing_is_captured_by_default(monkeypatch):
    monkeypatch.delenv("E4T_CUDA_GRAPHS", raising=False)
    assert recording.graph_capture_for(torch.device("cuda")) is None
    monkeypatch.setenv("E4T_CUDA_GRAPHS", "1")
    assert isinstance(recording.graph_capture_for(torch.device("cuda")), recording.CudaGraphCapture)
    assert recording.graph_capture_for(HERE) is None
    calls = []
    plain = CudaGraphRunner(lambda x: calls.append(x) or x, HERE, calls=100)
    given = torch.ones(1)
    assert plain(given) is given and calls == [given]
