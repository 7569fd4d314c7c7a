"""Invariants of checkpoints: atomic, the last two kept, and never resumed by another run."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from e4t_cli import files
from e4t_cli.errors import DivergedError, IntegrityError, ResourceError, UsageError
from e4t_cli.nn.randomness import draw, uniforms
from e4t_cli.pretraining import loop
from e4t_cli.pretraining.batches import DistributedContext
from e4t_cli.pretraining.checkpoints import Checkpoints
from tests.pretraining.conftest import RECIPE, Interrupted, interrupt_after, same, same_files


class Breaking:
    """Data that fails at some step and micro-batch, as whatever interrupts a run might."""

    def __init__(self, data, step, first):
        self.data, self.place, self.fingerprint = data, (step, first), data.fingerprint

    def __len__(self):
        return len(self.data)

    def rows(self, *, step, positions, **place):
        if (step, positions.start) == self.place:
            raise Interrupted
        return self.data.rows(step=step, positions=positions, **place)


@pytest.mark.parametrize("stopped", [1, 3, 4, 6])
@pytest.mark.parametrize("micro", [None, 3])
def test_R1_stopped_at_any_step_it_resumes_to_the_same_bits(pretrain, tmp_path, stopped, micro):
    """In the middle of an epoch (1, 4), at its end (3, 6), and between checkpoints."""
    options = {"micro_batch": micro, "checkpoint_every": 2}
    pretrain(checkpoints=tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        pretrain(checkpoints=tmp_path / "cut", on_step=interrupt_after(stopped), **options)
    torch.manual_seed(stopped)  # the global generator has no influence
    seen = []
    pretrain(checkpoints=tmp_path / "cut", on_step=lambda at: seen.append(at.step), **options)
    assert seen[0] == stopped // 2 * 2 + 1
    for name in ("step-00000006.safetensors", "step-00000007.safetensors"):
        assert same_files(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_R1_stopped_in_the_middle_of_an_accumulation(pretrain, data, tmp_path):
    """Half of a step's gradients are there, and lost: the step is done again."""
    whole = pretrain(micro_batch=2)
    with pytest.raises(Interrupted):
        pretrain(pictures=Breaking(data, 4, 2), micro_batch=2, checkpoints=tmp_path, checkpoint_every=2)
    assert same(whole, pretrain(micro_batch=2, checkpoints=tmp_path, checkpoint_every=2))


@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_micro_batches_take_the_step_of_the_whole_batch(pretrain, micro):
    """No layer mixes samples, so sums differ by rounding only."""
    config = RECIPE.replace(steps=3, base_learning_rate=1e-5)
    whole, split = (pretrain(config, micro_batch=size, autocast=False) for size in (None, micro))
    assert same(whole, split) == (micro == 100)
    for name, value in whole.encoder.state_dict().items():
        torch.testing.assert_close(split.encoder.state_dict()[name], value, atol=3e-6, rtol=3e-4)


def test_random_choices_match_the_sampled_noise():
    draws = draw(5, 7, range(2, 6), batch_size=8, train_timesteps=1000, shape=(1, 2, 2))
    assert torch.equal(uniforms(5, 7, 8)[2:6, 1:], draws.uniform)


# ── another run ──


def test_R4_another_run_is_refused_with_what_differs(pretrain, tmp_path, data):
    pretrain(checkpoints=tmp_path)
    changes = {
        "seed 3 → 4": {"seed": 4},
        "global batch 4 → 3": {"config": RECIPE.replace(batch_size=3)},
        "recipe.embedding_penalty 0.01 → 0.5": {"config": RECIPE.replace(reg_weight=0.5)},
        "data [0-9a-f]{32} → [0-9a-f]{32}": {"pictures": dataclasses.replace(data, means=data.means + 1)},
        "detach_features False → True, seed 3 → 5": {"detach_features": True, "seed": 5},
    }
    for sentence, change in changes.items():
        with pytest.raises(UsageError, match=sentence) as refused:
            pretrain(checkpoints=tmp_path, **change)
        assert "--resume-changed" in refused.value.hint


def test_R4_forced_it_goes_on_and_reports_the_differences(pretrain, tmp_path):
    pretrain(checkpoints=tmp_path)
    remarks, seen = [], []
    pretrain(
        RECIPE.replace(steps=8, reg_weight=0.5), seed=4, checkpoints=tmp_path, force=True,
        on_progress=lambda event: remarks.append(event.remark),
        on_step=lambda at: seen.append(at.step),
    )  # fmt: skip
    assert seen == [8]
    assert "continuing with other settings: recipe.embedding_penalty 0.01 → 0.5, seed 3 → 4" in remarks


def test_R4_another_shape_cannot_be_forced(pretrain, tmp_path):
    pretrain(RECIPE.replace(steps=1), checkpoints=tmp_path)
    with pytest.raises(UsageError, match="other shapes"):
        pretrain(hidden_width=48, checkpoints=tmp_path, force=True)


def test_R4_more_processes_only_with_the_same_global_batch(pretrain, tmp_path):
    """What two processes would check before they connect: the settings, and the error."""
    pretrain(RECIPE.replace(steps=1), checkpoints=tmp_path)
    with safe_open(Checkpoints(tmp_path, {}).latest(), framework="pt") as file:
        run = json.loads(file.metadata()["run"])
    two = {**run, "processes": 2, "recipe": {**run["recipe"], "batch_size": 2}, "micro_batch": 2}
    history = Checkpoints(tmp_path, two)
    history._compare(run, force=False)
    assert "1 processes before, 2 now: the samples of each step stay the same" in history.remarks[0]
    four = Checkpoints(tmp_path, {**run, "processes": 2})
    with pytest.raises(UsageError, match="global batch 4 → 8"):
        four._compare(run, force=False)
    four._compare(run, force=True)


def test_the_manifest_and_the_rate_count_all_processes(pretrain, monkeypatch):
    """One of two processes, without the other: rates and positions, without a network."""
    monkeypatch.setattr(DistributedContext, "wrap", lambda self, module: module)
    monkeypatch.setattr(DistributedContext, "mean", lambda self, values: values)
    monkeypatch.setattr(DistributedContext, "any", lambda self, flag: flag)
    monkeypatch.setattr(DistributedContext, "check_same", lambda self, number, what: None)
    remarks = []
    domain = pretrain(
        RECIPE.replace(steps=1), processes=DistributedContext(rank=0, count=2),
        on_progress=lambda event: remarks.append(event.remark),
    )  # fmt: skip
    assert domain.pretraining.batch_size == 8
    assert "learning rate 0.0008 = 0.0001 × batch 4 × 2 processes" in remarks
    silent = []
    pretrain(
        RECIPE.replace(steps=1), processes=DistributedContext(rank=1, count=2),
        on_progress=silent.append, on_step=silent.append,
    )  # fmt: skip
    assert not silent


# ── files ──


def test_latest_names_the_checkpoint_to_resume(pretrain, tmp_path):
    """Killed between the checkpoint and the pointer: the one before is as good."""
    whole = pretrain(checkpoints=tmp_path, checkpoint_every=3)
    assert sorted(os.listdir(tmp_path)) == [
        "latest",
        "step-00000006.safetensors",
        "step-00000007.safetensors",
    ]
    (tmp_path / "latest").write_text("step-00000006.safetensors\n")
    (tmp_path / ".step-00000009.safetensors.0123456789abcdef~").write_bytes(b"torn")
    seen = []
    again = pretrain(checkpoints=tmp_path, on_step=lambda at: seen.append(at.step))
    assert seen == [7]
    assert same(whole, again)
    assert not list(tmp_path.glob(".*"))
    for pointer in (b"step-00000099.safetensors", b"../elsewhere", b"\xff\xfe", b""):
        (tmp_path / "latest").write_bytes(pointer)
        assert same(whole, pretrain(checkpoints=tmp_path))
    (tmp_path / "latest").unlink()
    assert same(whole, pretrain(checkpoints=tmp_path))


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(pretrain, tmp_path):
    whole = pretrain(checkpoints=tmp_path, checkpoint_every=3)
    newest = tmp_path / "step-00000007.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    with pytest.raises(IntegrityError, match="step-00000007") as refused:
        pretrain(checkpoints=tmp_path)
    assert "the one before" in refused.value.hint
    newest.unlink()
    assert same(whole, pretrain(checkpoints=tmp_path))


@pytest.mark.parametrize("failing", ["write", "sync", "pointer"])
def test_R9_a_full_disk_leaves_the_checkpoint_before_intact(pretrain, tmp_path, monkeypatch, failing):
    """Full while the checkpoint is written, when it is synced, or at the pointer after it."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        # Each file is synced, and then its folder: 1, 2 checkpoint; 3, 4 pointer; 5 the second.
        if len(calls) == {"sync": 5, "pointer": 7}.get(failing):
            raise full
        return real(handle)

    def replace(one, other):
        if failing == "write" and "step-00000004" in str(other):
            raise full
        return os_replace(one, other)

    os_replace = os.replace
    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(ResourceError, match="checkpoint of step 4 could not be written") as failed:
        pretrain(checkpoints=tmp_path, checkpoint_every=2)
    monkeypatch.undo()
    assert failed.value.exit_code == 6
    assert "step-00000002.safetensors before it is intact" in str(failed.value)
    assert (tmp_path / "latest").read_text() == "step-00000002.safetensors\n"
    assert not list(tmp_path.glob(".*"))
    seen = []
    again = pretrain(checkpoints=tmp_path, checkpoint_every=2, on_step=lambda at: seen.append(at.step))
    assert seen == [3, 4, 5, 6, 7]
    assert same(again, pretrain())


def test_R9_the_old_ones_go_only_when_the_new_one_is_durable(pretrain, tmp_path, monkeypatch):
    events = []
    real_replace, real_sync = os.replace, os.fsync
    path_unlink = type(tmp_path).unlink

    def replace(one, other):
        events.append(f"rename {os.path.basename(other)}")
        return real_replace(one, other)

    def sync(handle):
        events.append("sync")
        return real_sync(handle)

    def unlink(path, **options):
        events.append(f"remove {path.name}")
        return path_unlink(path, **options)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(type(tmp_path), "unlink", unlink)
    pretrain(checkpoints=tmp_path, checkpoint_every=2)
    last = events[events.index("sync", events.index("remove step-00000002.safetensors")) :]
    assert last == [
        *("sync", "rename step-00000007.safetensors", "sync"),
        *("sync", "rename latest", "sync"),
        "remove step-00000004.safetensors",
    ]


# ── values that are not finite ──


def test_a_nan_in_the_loss_names_the_last_good_step(pretrain, data, tmp_path):
    class Poisoned(Breaking):
        def rows(self, *, step, **place):
            rows = self.data.rows(step=step, **place)
            if step == 4:  # the fifth step's images
                rows.means[0, 0, 0, 0] = torch.nan
            return rows

    poisoned = Poisoned(data, 0, 0)
    with pytest.raises(DivergedError) as stopped:
        pretrain(pictures=poisoned, checkpoints=tmp_path, checkpoint_every=3)
    assert stopped.value.exit_code == 7
    assert "diverged at step 5: the loss is nan; the last good step was 4" in str(stopped.value)
    assert "the checkpoint of step 3 is kept" in str(stopped.value)
    assert "step-00000003.safetensors" in os.listdir(tmp_path)
    kept = load_file(tmp_path / "step-00000003.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    seen = []
    pretrain(checkpoints=tmp_path, on_step=lambda at: seen.append(at.step))
    assert seen == [4, 5, 6, 7]


def test_weights_that_are_not_finite_are_never_saved(pretrain, tmp_path, monkeypatch):
    """The loss is still finite when a gradient overflows: the saved tensors are checked."""

    def poison(step):
        if step.step == 5:
            with torch.no_grad():
                step.encoder.final.weight[0, 0] = torch.inf

    with pytest.raises(DivergedError, match="at step (6|7)"):
        pretrain(checkpoints=tmp_path, checkpoint_every=2, on_step=poison)
    assert (tmp_path / "latest").read_text() == "step-00000004.safetensors\n"

    def spoil(step):
        if step.step == 3:  # before the next step's gradient, after which it is saved
            for moments in optimizers[0].state.values():
                moments["exp_avg"].fill_(torch.inf)

    optimizers, adamw = [], loop.adamw
    monkeypatch.setattr(loop, "adamw", lambda *groups: optimizers.append(adamw(*groups)) or optimizers[-1])
    with pytest.raises(DivergedError, match="a weight is not a finite number") as stopped:
        pretrain(checkpoints=tmp_path / "b", checkpoint_every=2, on_step=spoil)
    assert "the checkpoint of step 2 is kept" in str(stopped.value)
    assert (tmp_path / "b" / "latest").read_text() == "step-00000002.safetensors\n"


def test_a_checkpoint_holds_tensors_and_settings(pretrain, tmp_path):
    pretrain(RECIPE.replace(steps=1), checkpoints=tmp_path)
    tensors = load_file(tmp_path / "step-00000001.safetensors")
    assert {key.partition(".")[0] for key in tensors} == {"encoder", "offsets", "optimizer"}
