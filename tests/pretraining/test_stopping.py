"""R2, R3: signals and kills of real processes, and resuming from what they leave."""

import random
import signal
import time

import pytest
from safetensors.torch import load_file

from e4t_cli.progress import StopRequest
from tests.conftest import drawn_face
from tests.pretraining.conftest import same

# ── in one process ──


@pytest.mark.parametrize("asked", [1, 4, 5])
def test_R3_asked_to_stop_it_finishes_the_step_and_saves(pretrain, tmp_path, asked):
    stop, seen, said = StopRequest(), [], []
    assert not stop.ask()  # not listening yet: interrupt it

    def ask(step):
        seen.append(step.step)
        if step.step == asked:
            assert stop.ask()

    with pytest.raises(KeyboardInterrupt):
        pretrain(
            checkpoints=tmp_path, checkpoint_every=3, stop=stop, on_step=ask,
            on_progress=lambda event: said.append(event.remark),
        )  # fmt: skip
    last = asked + 1  # asked while the step was being reported: the next one sees it
    assert seen[-1] == last
    assert (tmp_path / "latest").read_text() == f"step-{last:08d}.safetensors\n"
    assert f"stopped after step {last} of 7, saved" in said
    assert not stop.ask()
    assert same(pretrain(checkpoints=tmp_path), pretrain())


def test_R3_asked_in_the_last_step_it_is_simply_done(pretrain, tmp_path):
    stop = StopRequest()
    domain = pretrain(checkpoints=tmp_path, stop=stop, on_step=lambda step: step.step == 6 and stop.ask())
    assert same(domain, pretrain())


def test_a_stop_request_outside_listening_is_ignored():
    stop = StopRequest()
    assert not stop.ask()
    assert not stop.asked  # a run that begins later is not stopped by it
    with stop.listening():
        assert stop.ask()
        assert stop.asked
    assert not stop.ask()


# ── real processes ──


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_R3_a_signal_saves_and_prints_how_to_resume(start, world, tmp_path, number, code):
    arguments = world("cut", slow=0.3, every=100)
    run = start(*arguments)
    run.wait_for("done 2")
    run.send(number)
    begun = time.monotonic()
    assert run.wait() == code
    assert time.monotonic() - begun < 30
    said = run.output()
    assert "of 12, saved" in said
    assert "error: interrupted" in said or "error: terminated" in said
    assert "Traceback" not in said
    done = said.count("done ")
    latest = (tmp_path / "cut" / "checkpoints" / "latest").read_text()
    assert latest == f"step-{done:08d}.safetensors\n"
    again = start(*world("cut", every=100))
    assert again.wait() == 0
    assert f"done {done + 1}\n" in again.output()
    assert f"resuming from step {done}" in again.output()
    whole = start(*world("whole", every=100))
    assert whole.wait() == 0
    for name in ("encoder.safetensors", "offsets.safetensors"):
        one, other = (tmp_path / folder / "pack" / name for folder in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_R3_a_second_signal_exits_at_once_without_corruption(start, world, tmp_path):
    run = start(*world("cut", slow=1.5, every=2))
    run.wait_for("done 2")
    run.send(signal.SIGINT)
    time.sleep(0.1)
    run.send(signal.SIGINT)
    begun = time.monotonic()
    assert run.wait() == 130
    assert time.monotonic() - begun < 1.4
    folder = tmp_path / "cut" / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000002.safetensors\n"
    assert start(*world("cut")).wait() == 0


def kill_at_random_moments(start, base_folder, tmp_path, *, kills, steps):
    """Kill a real `e4t pretrain` repeatedly; its domain equals that of an uninterrupted run."""
    pictures = tmp_path / "faces"
    pictures.mkdir()
    for index in range(6):
        drawn_face(index, 64)[0].save(pictures / f"{index}.png")

    def command(home):
        (tmp_path / home).mkdir(exist_ok=True)
        return start(
            "e4t", tmp_path / home, "pretrain", "--domain", "faces", "--descriptor", "face",
            "--data", pictures, "--base", base_folder, "--steps", steps, "--batch", 4,
            "--base-lr", "1e-4", "--checkpoint-every", 1, "--sample-every", 0, "--device", "cpu",
        )  # fmt: skip

    def domain_folder(home):
        (manifest,) = (tmp_path / home).glob("e4t/domains/faces/domain.toml")
        return manifest.parent

    # A machine may be fast or slow: moments are chosen by what a run takes when left alone.
    whole, begun = command("whole"), time.monotonic()  # the first one waits for the server
    while not latest(tmp_path / "whole"):
        assert whole.code() is None, whole.output()
        time.sleep(0.005)
    loading = time.monotonic() - begun
    assert whole.wait() == 0, whole.output()
    a_step = (time.monotonic() - begun - loading) / steps
    source = random.Random(20)
    for kill in range(kills):
        run = command("cut")
        if kill % 3:  # at work: some moments after another checkpoint
            moved = latest(tmp_path / "cut")
            while latest(tmp_path / "cut") == moved:
                assert run.code() is None, f"ended before kill {kill}: {run.output()}"
                time.sleep(0.005)
            time.sleep(source.uniform(0, 4 * a_step))
        else:  # or while it loads, encodes the images, or finds its checkpoint
            time.sleep(source.uniform(0, loading))
        assert run.code() is None, f"ended before kill {kill}: {run.output()}"
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        if latest(tmp_path / "cut"):  # whatever it names is whole
            (named,) = (tmp_path / "cut").rglob(latest(tmp_path / "cut"))
            load_file(named)
    assert latest(tmp_path / "cut")
    last = command("cut")
    assert last.wait() == 0, last.output()
    assert "resuming from step" in last.output()
    for name in ("encoder.safetensors", "offsets.safetensors"):
        assert (domain_folder("cut") / name).read_bytes() == (domain_folder("whole") / name).read_bytes()
    assert not list((tmp_path / "cut" / "e4t" / "domains").glob(".*"))


def latest(folder):
    """The checkpoint that a run in this home would go on from, "" for none."""
    return "".join(pointer.read_text().strip() for pointer in folder.rglob("latest"))


def test_R2_killed_at_random_moments_it_ends_in_the_same_bits(start, base_folder, tmp_path):
    kill_at_random_moments(start, base_folder, tmp_path, kills=3, steps=30)


@pytest.mark.slow
def test_R2_killed_at_twenty_random_moments(start, base_folder, tmp_path):
    kill_at_random_moments(start, base_folder, tmp_path, kills=20, steps=200)
