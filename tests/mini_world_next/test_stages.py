"""The stages of the next `mini`: what runs when, where results are found, and that they travel whole."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from e4t_cli.files import sha256_of
from mini_world.next import packing, workspace
from mini_world.next.__main__ import main
from mini_world.next.graph import STAGES
from mini_world.next.keeping import keep, restore_state
from mini_world.next.packing import PackingError, pack, read_parts, unpack
from mini_world.next.plans import CPU, PLANS, TINY
from mini_world.next.runner import STOPPED, Node, Runner, StageFailed, needed, ready
from mini_world.next.state import read_state, write_state
from mini_world.next.workspace import RESULT, StaleResult, Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "COMMITTED", tmp_path / "committed")
    return Workspace(tmp_path / "run", CPU)


def finish(work, stage, needs=(), value=1.0, shipped=True):
    made = work.folder / "unfinished" / stage
    (made / "deep").mkdir(parents=True)
    save_file({"x": torch.full((3,), value)}, made / "deep" / "x.safetensors")
    work.state(stage).mkdir(parents=True)
    (work.state(stage) / "log.jsonl").write_text('{"step": 1}\n')
    work.finish(stage, needs, made, {"psnr": value}, shipped=shipped)


# The graph


def test_every_stage_needs_stages_before_it():
    names = list(STAGES)
    for place, (name, node) in enumerate(STAGES.items()):
        assert set(node.needs) <= set(names[:place]), name


def test_every_stage_leads_to_the_report():
    assert needed(STAGES, ["report"], lambda name: False) == list(STAGES)


def test_only_what_is_missing_runs():
    assert needed(STAGES, ["report"], lambda name: True) == []
    # A fresh clone with all results but the domains draws and encodes nothing for the other networks.
    kept = {"vae", "text", "tower", "decoder", "unet", "base", "parser", "judge"}
    assert needed(STAGES, ["report"], kept.__contains__) == [
        "portraits",
        "words",
        "face",
        "cat",
        "art",
        "evaluate",
        "report",
    ]
    assert needed(STAGES, ["base"], {"text", "tower", "decoder", "unet"}.__contains__) == ["base"]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_stage_starts_before_its_needs_and_none_is_forgotten(slots):
    rng = random.Random(slots)
    for _ in range(50):
        waiting, running, done = list(STAGES), [], []
        while waiting or running:
            for name in ready(STAGES, waiting, running, slots):
                assert set(STAGES[name].needs) <= set(done)
                waiting.remove(name)
                running.append(name)
            assert 0 < len(running) <= slots
            assert len(running) == 1 or not any(STAGES[name].shared for name in running)
            done.append(running.pop(rng.randrange(len(running))))
        assert sorted(done) == sorted(STAGES)


def test_two_slots_train_the_vae_beside_the_others():
    running = ready(
        STAGES, [name for name in STAGES if name not in ("draw", "portraits", "text", "perceptual")], [], 2
    )
    assert running == ["vae", "tower"]
    assert ready(STAGES, ["parser", "encode", "unet"], ["vae"], 2) == ["parser"]


# The runner, with small programs as stages

PROGRAM = """
import os, pathlib, sys, time
name, folder, how = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
with (folder / "log").open("a") as log:
    log.write(f"{name} {os.environ.get('RANK', '')}/{os.environ.get('WORLD_SIZE', '')}\\n")
if how == "fail":
    sys.exit(3)
if how == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    while time.time() < float(os.environ.get("MINI_STOP_AT", "inf")):
        time.sleep(0.05)
    sys.exit(75)
(folder / name).touch()
"""
NODES = {"a": Node(), "b": Node(), "c": Node(("a",)), "d": Node(("b", "c"), shared=True), "e": Node(("d",))}


def runner(folder, how=None, **options):
    folder.mkdir(exist_ok=True)
    how = how or {}

    def command(name):
        return [sys.executable, "-S", "-c", PROGRAM, name, str(folder), how.get(name, "")]

    return Runner(NODES, command, **options), lambda name: (folder / name).exists()


def test_stages_run_in_order_and_shared_ones_as_several_processes(tmp_path):
    run, finished = runner(tmp_path, slots=2)
    assert run.run(["e"], finished)
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert sorted(lines) == ["a /", "b /", "c /", "d 0/2", "d 1/2", "e /"]
    assert lines[-1] == "e /"
    assert run.run(["e"], finished)  # nothing is left to do
    assert len((tmp_path / "log").read_text().splitlines()) == 6


def test_a_failure_is_told_and_the_others_end(tmp_path):
    run, finished = runner(tmp_path, {"a": "fail", "b": "wait"}, slots=2)
    with pytest.raises(StageFailed, match="stage a failed with exit status 3"):
        run.run(["e"], finished)
    assert not run.running
    assert not finished("c")


def test_the_time_is_kept_and_the_run_goes_on_afterwards(tmp_path):
    run, finished = runner(tmp_path, {"a": "wait"}, slots=1, minutes=0.01)
    assert not run.run(["e"], finished)
    assert (tmp_path / "log").read_text() == "a /\n"
    run, finished = runner(tmp_path, slots=1)
    assert run.run(["e"], finished)


def test_a_stage_without_a_result_has_failed(tmp_path):
    run, _ = runner(tmp_path)
    with pytest.raises(StageFailed, match="without a result"):
        run.run(["a"], lambda name: False)


# Results


def test_a_result_is_whole_or_absent(work):
    assert work.find("vae") is None
    with pytest.raises(FileNotFoundError, match="mini_world.next vae"):
        work.result("vae")
    finish(work, "vae")
    assert work.facts("vae") == {"psnr": 1.0}
    assert (work.result("vae") / "log.jsonl").exists()
    assert not work.state("vae").exists()


def test_results_of_the_repository_are_found_second(work, tmp_path):
    finish(work, "vae")
    (work.results / "vae").rename(tmp_path / "moved")
    assert work.find("vae") is None
    (tmp_path / "committed").mkdir()
    (tmp_path / "moved").rename(tmp_path / "committed" / "vae")
    assert work.find("vae") == tmp_path / "committed" / "vae"
    assert Workspace(work.folder, TINY).find("vae") is None
    finish(work, "vae", value=2.0)
    assert work.find("vae") == work.results / "vae"


def test_a_result_of_other_inputs_is_refused_and_kept(work):
    finish(work, "draw", shipped=False)
    finish(work, "vae", ("draw",))
    finish(work, "encode", ("draw", "vae"), shipped=False)
    finish(work, "unet", ("encode",))
    for name in ("vae", "encode", "unet"):
        work.check(name)
    # What they say of themselves, such as their version, identifies them; other bits do not.
    plain = work.identity("draw")
    for folder in ("old draw", "older draw"):
        (work.results / "draw").rename(work.folder / folder)
        made = work.folder / "unfinished" / "draw"
        made.mkdir()
        (made / "drawings.json").write_text(folder)
        work.finish("draw", (), made, {}, shipped=False)
        assert work.identity("draw") != plain
        with pytest.raises(StaleResult, match="vae was made from another draw"):
            work.check("vae")
    (work.results / "draw").rename(work.folder / "oldest draw")
    (work.folder / "old draw").rename(work.results / "draw")
    # Drawings and latents made again, with other last bits, are the same.
    (work.results / "draw").rename(work.folder / "old")
    finish(work, "draw", value=1.5, shipped=False)
    work.check("vae")
    (work.results / "encode").rename(work.folder / "old encode")
    finish(work, "encode", ("draw", "vae"), value=1.5, shipped=False)
    work.check("unet")
    # Another VAE is not, wherever it is asked.
    (work.results / "vae").rename(work.folder / "old vae")
    finish(work, "vae", ("draw",), value=3.0)
    with pytest.raises(StaleResult, match="encode was made from another vae"):
        work.check("encode")
    assert work.find("encode")


# Packing


def state(folder, size=4000):
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(size, generator=generator)
    tensors = {
        "main/weights.x": weights,
        "main/average.x": weights + 0.01 * torch.randn(size, generator=generator),
        "main/optimizer.0.0.exp_avg": torch.randn(size, generator=generator),
    }
    folder.mkdir(parents=True)
    write_state(folder / "unet.state.safetensors", tensors, {"step": 7})
    (folder / "unet.jsonl").write_text('{"step": 50}\n')
    return tensors


@pytest.fixture
def packed(work, tmp_path):
    finish(work, "draw", shipped=False)
    finish(work, "vae", ("draw",))
    state(work.state("unet"))
    return pack(work, ["vae"], tmp_path / "packed")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_and_states_travel_whole(work, packed, tmp_path):
    assert [path.name for path in packed] == ["mini-1-of-1.part"]
    other = Workspace(tmp_path / "other", CPU)
    assert unpack(other, tmp_path / "packed") == ["results/vae", "states/unet"]
    for part in ("results/vae", "states/unet"):
        assert files_of(work.folder / part) == files_of(other.folder / part)
    assert not (other.results / "draw").exists()
    assert not list(other.folder.glob(".*"))


def test_what_is_too_large_is_rounded_or_refused(work, packed, tmp_path, monkeypatch):
    """Weights stay exact, the rest is rounded; the number and size of files are kept to."""
    exact = load_file(work.state("unet") / "unet.state.safetensors")
    size = len(read_parts(tmp_path / "packed"))
    monkeypatch.setattr(packing, "PARTS", 4)
    monkeypatch.setattr(packing, "PART", (size - 8192) // 4 + packing._LINE)
    paths = pack(work, ["vae"], tmp_path / "packed")
    assert len(paths) <= 4
    assert all(path.stat().st_size <= packing.PART for path in paths)
    assert sorted(paths) == sorted((tmp_path / "packed").iterdir())
    other = Workspace(tmp_path / "other", CPU)
    unpack(other, tmp_path / "packed")
    found = load_file(other.state("unet") / "unet.state.safetensors")
    assert found.keys() == exact.keys()
    assert torch.equal(found["main/weights.x"], exact["main/weights.x"])
    for name in ("main/average.x", "main/optimizer.0.0.exp_avg"):
        assert not torch.equal(found[name], exact[name])
        torch.testing.assert_close(found[name], exact[name], rtol=0.01, atol=1e-3)
    monkeypatch.setattr(packing, "PART", 1024)
    before = files_of(tmp_path / "packed")
    with pytest.raises(PackingError, match="more than 4 files"):
        pack(work, ["vae"], tmp_path / "packed")
    assert files_of(tmp_path / "packed") == before


def test_a_damaged_or_missing_part_is_told(work, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PART", 16384)
    paths = pack(work, ["vae"], tmp_path / "packed")
    assert len(paths) > 2
    other = Workspace(tmp_path / "other", CPU)
    content = paths[1].read_bytes()
    for damaged in (content[:-1], content[:700] + bytes([content[700] ^ 1]) + content[701:], b"x" + content[1:], b""):
        paths[1].write_bytes(damaged)
        with pytest.raises(PackingError, match="mini-2-of-.*damaged"):
            unpack(other, tmp_path / "packed")
    paths[1].unlink()
    with pytest.raises(PackingError, match="part 2 of .* is missing"):
        unpack(other, tmp_path / "packed")
    with pytest.raises(PackingError, match="no files"):
        unpack(other, tmp_path / "nowhere")
    assert not files_of(other.folder) if other.folder.exists() else True


def test_nothing_is_overwritten(work, packed, tmp_path):
    other = Workspace(tmp_path / "other", CPU)
    finish(other, "vae", value=9.0)
    before = files_of(other.folder)
    with pytest.raises(PackingError, match="exists and is another"):
        unpack(other, tmp_path / "packed")
    assert files_of(other.folder) == before
    third = Workspace(tmp_path / "third", CPU)
    unpack(third, tmp_path / "packed")
    with pytest.raises(PackingError, match="states/unet exists"):
        unpack(third, tmp_path / "packed")


def test_an_empty_run_is_not_packed(work, tmp_path):
    with pytest.raises(PackingError, match="nothing to pack"):
        pack(work, ["vae"], tmp_path / "packed")


# Keeping


def test_a_fresh_clone_goes_on_from_what_is_kept(work, tmp_path):
    nodes = {"draw": Node(shipped=False), "text": Node(("draw",)), "vae": Node(("draw", "text")), "tower": Node()}
    finish(work, "draw", shipped=False)
    finish(work, "text", ("draw",))
    tensors = state(work.state("vae"))
    (work.state("vae") / "unet.state.safetensors").rename(work.state("vae") / "vae.state.safetensors")
    kept = keep(work, nodes)
    committed = workspace.COMMITTED
    assert kept == [committed / "text", committed / "states/vae"] and not list(committed.rglob(".*"))
    clone = Workspace(tmp_path / "clone", CPU)
    assert clone.find("text") and not restore_state(clone, "text") and not restore_state(clone, "tower")
    assert restore_state(clone, "vae") and not restore_state(clone, "vae")
    found = load_file(clone.state("vae") / "vae.state.safetensors")
    assert torch.equal(found["main/weights.x"], tensors["main/weights.x"])
    torch.testing.assert_close(found["main/average.x"], tensors["main/average.x"], rtol=0.01, atol=1e-3)
    assert (clone.state("vae") / "unet.jsonl").exists()
    assert not restore_state(Workspace(tmp_path / "tiny", TINY), "vae")
    other = Workspace(tmp_path / "other", CPU)
    finish(other, "text", value=2.0)
    with pytest.raises(StaleResult, match="trained on another text"):
        restore_state(other, "vae")
    # Finished: the result takes the place of the state.
    shutil.rmtree(work.state("vae"))
    finish(work, "vae", ("draw", "text"))
    assert keep(work, nodes) == [committed / "text", committed / "vae"]
    assert not (committed / "states/vae").exists() and work.find("vae") == work.results / "vae"
    with pytest.raises(ValueError, match="rehearsal"):
        keep(Workspace(tmp_path / "tiny", TINY), nodes)


def test_what_the_repository_keeps_is_whole_and_in_small_files():
    paths = [path for path in workspace.COMMITTED.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} <= {".safetensors", ".json", ".jsonl", ".txt", ".md", ".toml", ".gz"}
    assert all(path.stat().st_size <= 16 * 2**20 for path in paths)
    for record in workspace.COMMITTED.glob("*/" + RESULT):
        said = json.loads(record.read_text())
        assert said["plan"] in ("cpu", "cuda") and said["stage"] == record.parent.name
        for name, digest in said["files"].items():
            assert sha256_of(record.parent / name) == digest, name


# All of it


def test_plans_keep_pairs_and_batches_whole():
    for plan in PLANS.values():
        counts = [plan.drawings, plan.scenes, plan.judged, *plan.portraits.values(), *plan.held_out.values()]
        assert all(count % 2 == 0 for count in counts)  # two drawings of each identity
        assert plan.latents <= plan.drawings
        assert plan.unet_batch % 4 == 0 and plan.vae_batch % 2 == 0  # several processes share them
        assert plan.domains.keys() == plan.portraits.keys() == plan.held_out.keys()


def test_every_stage_is_a_function():
    from mini_world.next import stages

    assert {name for name in vars(stages) if name.startswith("run_")} == {f"run_{name}" for name in STAGES} | {
        "run_stage"
    }


def test_a_finished_run_makes_no_drawings_again(tmp_path, capsys):
    work = Workspace(tmp_path / "run", TINY)
    for name, node in STAGES.items():
        if node.shipped:
            finish(work, name)
    assert main(["--tiny", "--folder", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err == "" and work.find("draw") is None


def run_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mini_world.next", *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_status_and_wrong_arguments(tmp_path, capsys):
    assert main(["status", "--tiny", "--folder", str(tmp_path)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [[name, "-"] for name in STAGES]
    for wrong in (["pack"], ["keep", "--tiny"], ["draw", str(tmp_path)], ["nothing"], ["--parallel", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "out"), "--tiny", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: there is nothing to pack")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_runs_to_the_end_and_travels(tmp_path):
    """All stages at tiny lengths, two at a time, with a move to another folder and a stop of two processes."""
    one, two, packed = (str(tmp_path / name) for name in ("one", "two", "packed"))
    for target in ("decoder", "text"):
        first = run_command(target, "--tiny", "--folder", one)
        assert first.returncode == 0, first.stderr
    assert run_command("pack", packed, "--tiny", "--folder", one).returncode == 0
    assert run_command("unpack", packed, "--tiny", "--folder", two).returncode == 0
    assert run_command("encode", "--tiny", "--folder", two).returncode == 0
    stopped = run_command("unet", "--tiny", "--folder", two, "--parallel", "2", "--minutes", "0.05")
    assert stopped.returncode == STOPPED, stopped.stderr
    _, facts = read_state(tmp_path / "two/states/unet/unet.state.safetensors")
    assert 1 <= facts["step"] < TINY.unet
    rest = run_command("--tiny", "--folder", two, "--parallel", "2")
    assert rest.returncode == 0, rest.stderr
    assert "| encoder alone |" in (tmp_path / "two/results/report/domains.md").read_text()
    assert "| art | attribute |" in (tmp_path / "two/results/report/words.md").read_text()
    table = (tmp_path / "two/results/report/training.md").read_text()
    for name in set(STAGES) - {"report"}:
        assert f"\n| {name} | tiny |" in table
        record = json.loads((tmp_path / "two/results" / name / RESULT).read_text())
        assert record["facts"]["seconds"] >= 0
    again = run_command("--tiny", "--folder", two)
    assert again.returncode == 0
    assert again.stderr == ""
