"""The training loop of the next base: interrupted or not, the same weights; two opposing losses; exported states."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from e4t_cli.temporary import temporary_path
from mini_world.next import loop, optimizers, state
from mini_world.next.loop import Objective, Unfinished, train, train_objectives


class Killed(BaseException):
    """Raised where a process would be killed: nothing is saved."""


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    monkeypatch.setattr(loop, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("RANK", raising=False)


def duel(folder, *, steps=48, kill=None, act=None, average=0.9, optimizer=optimizers.adamw, **options):
    """Train a tiny generator against a tiny discriminator; returns both as the loop leaves them."""
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1))
    critic = nn.Conv2d(16, 1, 3)
    made = {}

    def make(step, generator):
        if step == kill:
            raise Killed
        if act is not None:
            act(step)
        x = torch.randn(2, 2, 6, 6, generator=generator)
        made["image"] = maker(x)
        assert step < 10 or not critic.weight.requires_grad
        return {
            "error": (made["image"] - x.repeat(1, 8, 1, 1)).pow(2).mean(),
            "adversary": -0.1 * critic(made["image"]).mean(),
        }

    def criticize(step, generator):
        assert step >= 10 and not maker[0].weight.requires_grad
        real = torch.randn(2, 16, 6, 6, generator=generator)
        return {"critic": critic(made["image"].detach()).relu().mean() + (1 - critic(real)).relu().mean()}

    objectives = {
        "maker": Objective({"maker": maker}, make, 1e-2, average=average, warm_up=10, optimizer=optimizer),
        "critic": Objective({"critic": critic}, criticize, 1e-2, start=10, warm_up=10),
    }
    train_objectives("duel", folder, objectives, steps=steps, **options)
    return nn.ModuleList([maker, critic])


def same(one, other):
    other = other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.muon])
@pytest.mark.parametrize("average", [None, 0.9])
def test_a_killed_training_ends_where_an_unbroken_one_does(tmp_path, average, optimizer):
    whole = duel(tmp_path / "whole", average=average, optimizer=optimizer)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = temporary_path(tmp_path / "broken" / "duel.state.safetensors")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))  # of a process that was killed
    for kill in (6, 33):
        with pytest.raises(Killed):
            duel(tmp_path / "broken", average=average, optimizer=optimizer, kill=kill, save_every_seconds=-1.0)
        _, facts = state.read_state(tmp_path / "broken" / "duel.state.safetensors")
        assert facts["step"] == kill
        left.write_bytes(b"half a state")
    resumed = duel(tmp_path / "broken", average=average, optimizer=optimizer)
    assert same(whole, resumed)
    one, _ = state.read_state(tmp_path / "whole" / "duel.state.safetensors")
    other, _ = state.read_state(tmp_path / "broken" / "duel.state.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["duel.state.safetensors"]


def test_lines_of_the_log_are_written_once(tmp_path, monkeypatch):
    """Also those between the last saved state and the kill, with the sums of both parts of a run."""
    monkeypatch.setattr(loop, "LOG_EVERY", 10)
    duel(tmp_path / "whole", steps=22)
    with pytest.raises(Unfinished):
        duel(tmp_path / "broken", steps=22, minutes=0.0)  # stops after one step
    with pytest.raises(Killed):
        duel(tmp_path / "broken", steps=22, kill=21)  # saves nothing
    duel(tmp_path / "broken", steps=22)
    whole, broken = (
        [json.loads(line) for line in (tmp_path / name / "duel.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert [line["step"] for line in broken] == [10, 20]
    for one, other in zip(whole, broken, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_out_of_time_is_unfinished_and_saved(tmp_path):
    for step in (1, 2, 3):
        with pytest.raises(Unfinished, match=f"stopped after step {step} of 48") as stopped:
            duel(tmp_path, minutes=0.0)
        assert stopped.value.code == loop.UNFINISHED
    loop.limit_time(0.0)
    try:
        with pytest.raises(Unfinished, match="step 4 of 48"):
            duel(tmp_path)
    finally:
        loop.limit_time(None)
    assert same(duel(tmp_path), duel(tmp_path / "whole"))


def test_sigterm_saves_the_state(tmp_path):
    def end(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Unfinished, match="step 8 of 48"):
        duel(tmp_path / "broken", act=end)
    assert signal.getsignal(signal.SIGTERM) is before
    assert same(duel(tmp_path / "broken"), duel(tmp_path / "whole"))


@pytest.mark.slow
def test_the_exit_code_says_unfinished(tmp_path):
    script = f"""
import torch
from pathlib import Path
from torch import nn
from e4t_cli.temporary import temporary_path
from mini_world.next import loop
layer = nn.Linear(2, 2)
loss = lambda step, generator: {{"loss": layer(torch.randn(1, 2, generator=generator)).pow(2).mean()}}
loop.train("one", Path({str(tmp_path)!r}), {{"layer": layer}}, loss, steps=5, learning_rate=0.1, minutes=0.0)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120
    )
    assert result.returncode == 75
    assert (tmp_path / "one.state.safetensors").exists()


def test_the_average_is_what_is_returned(tmp_path):
    smooth, last = duel(tmp_path / "a"), duel(tmp_path / "b", average=None)
    assert not torch.equal(smooth[0][0].weight, last[0][0].weight)
    stored, _ = state.read_state(tmp_path / "a" / "duel.state.safetensors")
    assert torch.equal(stored["maker/average.maker.0.weight"], smooth[0][0].weight)
    assert torch.equal(stored["maker/weights.maker.0.weight"], last[0][0].weight)
    assert torch.equal(smooth[1].weight, last[1].weight)
    assert not smooth[0].training
    assert all(p.requires_grad for p in smooth.parameters())


def exported(files):
    return {name: tensor for file in files for name, tensor in state.read_state(file)[0].items()}


def test_an_exported_state_is_small_and_resumes(tmp_path):
    with pytest.raises(Unfinished):
        duel(tmp_path, act=lambda step: step == 40 and os.kill(os.getpid(), signal.SIGTERM))
    path = tmp_path / "duel.state.safetensors"
    limit = state._HEADER + 10_000
    files = state.state_files(path, tmp_path / "export", limit=limit)
    assert len(files) > 1
    assert all(file.stat().st_size <= limit for file in files)
    kinds = {name: tensor.dtype for name, tensor in exported(files).items() if tensor.dim() > 0}
    assert {kind for name, kind in kinds.items() if "/weights." not in name} == {torch.bfloat16}
    with pytest.raises(ValueError, match="not the whole export"):
        state.join_state_files(files[1:], tmp_path / "other" / path.name)
    state.join_state_files(reversed(files), tmp_path / "other" / path.name)
    one, facts = state.read_state(path)
    other, others = state.read_state(tmp_path / "other" / path.name)
    assert facts == others
    assert one.keys() == other.keys()
    for name in one:
        if "/weights." in name:
            assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name].float(), other[name].float(), rtol=0.01, atol=1e-3)
    here, there = duel(tmp_path), duel(tmp_path / "other")
    torch.testing.assert_close(here[0][0].weight, there[0][0].weight, rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="more than one file"):
        state.state_files(path, tmp_path / "export", limit=state._HEADER + 100)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_kernels_as_matrices(layout):
    """Momentum without history: the step is the orthogonalized gradient, whatever the memory format."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 16, 3, 3).to(memory_format=layout))
    before = kernel.detach().clone()
    gradient = torch.randn(16, 16, 3, 3)
    kernel.grad = gradient.to(memory_format=layout)
    steps = optimizers.muon({"kernel": kernel, "bias": nn.Parameter(torch.zeros(3))}, 0.1)
    steps[0].step()
    moved = ((before * (1 - 0.1 * 0.01) - kernel.detach()) / 0.1).flatten(1)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.5 and values.max() < 1.5
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(moved.flatten(), (u @ v).flatten(), 0) > 0.9


def test_the_state_of_muon_fits_both_memory_formats():
    """A training goes on from CPU to GPU and back: momentum belongs to the same weights."""
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(16, 17, 3, 3))
    last = nn.Parameter(plain.detach().to(memory_format=torch.channels_last, copy=True))
    one, other = (optimizers.KernelMuon([kernel], 0.1) for kernel in (plain, last))
    gradients = torch.randn(3, 16, 17, 3, 3)
    plain.grad = gradients[0].clone()
    one.step()
    stored = one.state_dict()
    other.load_state_dict(stored)
    with torch.no_grad():
        last.copy_(plain)
    back = other.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(back, stored["state"][0]["momentum_buffer"])
    for kernel, optimizer in ((plain, one), (last, other)):
        kernel.grad = gradients[1].to(memory_format=torch.channels_last if kernel is last else torch.contiguous_format)
        optimizer.step()
    torch.testing.assert_close(plain, last, rtol=0, atol=0.02)  # orthogonalized in bfloat16


def test_it_learns(tmp_path):
    layer = nn.Linear(4, 3)

    def loss_of_step(step, generator):
        x = torch.randn(8, 4, generator=generator)
        return {"square": (layer(x) - x[:, :3].cumsum(1)).pow(2).mean()}

    modules = {"layer": layer}
    assert train("one", tmp_path, modules, loss_of_step, steps=300, learning_rate=1e-2, average=0.9) is modules
    lines = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert lines[-1]["square"] < 0.5 * lines[0]["square"]
