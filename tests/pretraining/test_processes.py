"""R8, R11: distributed pre-training in two processes with gloo on the CPU, started by torchrun."""

import signal
import time
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from e4t_cli.pretraining.batches import DistributedContext, init_distributed
from tests.conftest import drawn_face


def test_a_single_process_opens_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed() as processes:
        assert processes == DistributedContext()
    assert processes.first
    assert processes.positions(4) == range(4)
    assert DistributedContext(rank=2, count=3).positions(4) == range(8, 12)
    module = torch.nn.Linear(2, 2)
    assert processes.wrap(module) is module
    assert processes.any(True)
    assert not processes.any(False)


def close(one, other, tolerance):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=tolerance, rtol=1e-3, msg=key)


def test_R11_two_by_eight_follows_one_by_sixteen(start, world, tmp_path):
    """The same samples, the same losses, the same weights, up to how sums are rounded."""
    one = start(*world("one", batch=16, steps=10, every=5))
    assert one.wait() == 0
    # Each accumulates over micro-batches as well: 2 × 2 × 4.
    two = start(*world("two", batch=8, steps=10, every=5, micro=4), processes=2)
    assert two.wait() == 0, two.output()
    assert "learning rate 0.0016 = 0.0001 × batch 16 × 1 process" in one.output()
    assert two.output().count("learning rate 0.0016 = 0.0001 × batch 8 × 2 processes") == 1

    def losses(run):
        lines = [line.split() for line in run.output().splitlines() if line.startswith("step ")]
        return [(int(step), float(loss)) for _, step, _, loss in lines]

    assert [step for step, _ in losses(one)] == [step for step, _ in losses(two)] == [5, 10]
    for (_, alone), (_, together) in zip(losses(one), losses(two), strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    for step in (5, 10):
        name = f"step-{step:08d}.safetensors"
        folders = [tmp_path / folder / "checkpoints" for folder in ("one", "two")]
        close(folders[0] / name, folders[1] / name, 2e-5 * step)


def test_R4_R8_one_process_killed_ends_all_and_the_run_resumes(
    start,
    world,
    tmp_path,
):
    arguments = {"batch": 2, "steps": 8, "every": 3}
    run = start(*world("cut", **arguments, dies=5), processes=2)
    begun = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - begun < 120
    assert "local_rank: 1" in run.output()
    assert "Signal 9" in run.output()
    folder = tmp_path / "cut" / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000003.safetensors\n"
    again = start(*world("cut", **arguments), processes=2)
    assert again.wait() == 0, again.output()
    assert "done 4\n" in again.output()
    whole = start(*world("whole", **arguments), processes=2)
    assert whole.wait() == 0
    for name in ("encoder.safetensors", "offsets.safetensors"):
        one, other = (tmp_path / folder / "pack" / name for folder in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    # The same global batch in one process: allowed, and reported.
    alone = start(*world("cut", batch=4, steps=9, every=3))
    assert alone.wait() == 0, alone.output()
    assert "2 processes before, 1 now" in alone.output()


@pytest.mark.slow
def test_R3_a_signal_to_the_launcher_stops_all_of_them(start, world, tmp_path):
    run = start(*world("cut", batch=2, steps=200, every=100, slow=0.05), processes=2)
    run.wait_for("done 3")
    run.send(signal.SIGTERM)
    assert run.wait() != 0
    assert "of 200, saved" in run.output()
    done = run.output().count("done ")
    assert done < 60  # within seconds
    latest = (tmp_path / "cut" / "checkpoints" / "latest").read_text()
    assert latest == f"step-{done:08d}.safetensors\n"


def test_R11_the_command_under_a_launcher(start, base_folder, tmp_path):
    """`e4t pretrain` in two processes: one cache, one output, one domain."""
    pictures = tmp_path / "faces"
    pictures.mkdir()
    for index in range(6):
        drawn_face(index, 64)[0].save(pictures / f"{index}.png")

    def command(home, batch, processes):
        (tmp_path / home).mkdir()
        return start(
            "e4t", tmp_path / home, "pretrain", "--domain", "faces", "--descriptor", "face",
            "--data", pictures, "--base", base_folder, "--steps", 4, "--batch", batch,
            "--base-lr", "1e-4", "--device", "cpu", processes=processes,
        )  # fmt: skip

    both, alone = command("both", 2, 2), command("alone", 4, 1)
    assert both.wait() == alone.wait() == 0, both.output() + alone.output()
    domain_folders = [tmp_path / home / "e4t" / "domains" / "faces" for home in ("alone", "both")]
    assert both.output().splitlines().count(str(domain_folders[1])) == 1
    assert both.output().count("learning rate 0.0004 = 0.0001 × batch 2 × 2 processes") == 1
    for name in ("encoder.safetensors", "offsets.safetensors"):
        close(domain_folders[0] / name, domain_folders[1] / name, 1e-4)
    manifests = [tomllib.loads((domain_folder / "domain.toml").read_text()) for domain_folder in domain_folders]
    assert [manifest["pretraining"]["batch_size"] for manifest in manifests] == [4, 4]
    assert [manifest["images"] for manifest in manifests] == [6, 6]
