"""`e4t batch`: the same files as the single commands, once each, whatever happens in between."""

import json
import subprocess
import sys

import pytest

import e4t_cli
from e4t_cli.cli import console
from e4t_cli.cli.batch_files import BatchSaver
from e4t_cli.errors import UsageError
from e4t_cli.formats.batch_manifest import Manifest
from e4t_cli.images.png_metadata import png_bytes, read_records
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.training import tuning
from tests.conftest import drawn_face

PROMPTS = ["S* on the beach", "a drawing of S*"]


@pytest.fixture
def photos(tmp_path):
    """The names of two photos in the folder that commands run in."""
    for index, name in enumerate(("ann", "bob"), start=3):
        drawn_face(index, 96)[0].save(tmp_path / f"{name}.png")
    return ["ann.png", "bob.png"]


@pytest.fixture
def batch(run, world, photos):
    """Run `e4t batch` on the tiny base in a few steps."""

    def batch(*arguments, **options):
        return run("batch", *arguments, "--base", str(world.base), "--steps", "2", "--tune-steps", "1", **options)

    return batch


def write_jobs(folder, *jobs):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in jobs]
    (folder / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    return "jobs.jsonl"


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def count(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: (calls.append(args), original(*args, **kw))[1])
    return calls


def test_files_are_those_of_the_single_command(run, world, batch, photos, tmp_path, monkeypatch):
    jobs = write_jobs(
        tmp_path,
        *({"domain": str(world.pack), "image": one, "seed": 5 + i, "save": f"all/{one[:3]}.e4t"}
          for i, one in enumerate(photos)),
    )  # fmt: skip
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]} --n 2\n{PROMPTS[1]} --seed 9 --steps 3\n")
    bases, weights = count(monkeypatch, TextToImageModel, "load"), count(monkeypatch, DomainWeights, "load")
    ended = batch(jobs, "-f", "prompts.txt", "-o", "all", "--json")
    assert ended.code == 0, ended.err
    assert len(bases) == len(weights) == 1
    for number, photo in enumerate(photos):
        single = world.personalize("-f", "prompts.txt", "--seed", str(5 + number), "-o", "single", prompts=())
        single[2] = photo
        assert run(*single, "--save", f"single/{photo[:3]}.e4t").code == 0
    assert len(pictures(tmp_path / "all")) == 6
    assert pictures(tmp_path / "all") == pictures(tmp_path / "single")
    for photo in photos:
        assert (tmp_path / f"all/{photo[:3]}.e4t").read_bytes() == (tmp_path / f"single/{photo[:3]}.e4t").read_bytes()
    records = [json.loads(line) for line in ended.lines]
    assert [(one["type"], one["job"]) for one in records] == [
        (kind, job) for job in (1, 2) for kind in ("concept", "image", "image", "image")
    ]
    assert all((tmp_path / one["path"]).is_file() and one["schema"] == 1 for one in records)


def test_mini_gives_the_same_bits(run, photos, tmp_path):
    few = ("--base", "mini", "--steps", "2", "--tune-steps", "2", "--seed", "3")
    arguments = ["-p", PROMPTS[0], "-p", "a pencil sketch of S*", "-o", "all"]
    ended = run("batch", "face", *photos, *arguments, *few)
    assert ended.code == 0, ended.err
    one = run("personalize", "face", photos[1], PROMPTS[0], "a pencil sketch of S*", "-o", "single", *few)
    assert one.code == 0, one.err
    assert len(ended.lines) == 4
    single, every = pictures(tmp_path / "single"), pictures(tmp_path / "all")
    assert len(single) == 2 and single.items() <= every.items()


def test_the_same_command_continues(batch, world, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("E4T_TUNED_CACHE", "1")
    arguments = [str(world.pack), *photos, "-p", PROMPTS[0], "-n", "2", "-o", "out"]
    first = batch(*arguments)
    assert first.code == 0 and len(first.lines) == 4
    before = pictures(tmp_path / "out")
    seeds = {read_records(data)[0].seed for data in before.values()}
    assert len(seeds) == 4  # each photo has one of its own
    loads = count(monkeypatch, TextToImageModel, "load")
    again = batch(*arguments)
    assert (again.code, again.out, loads) == (0, "", [])
    assert "2 of 2 jobs, 0 images" in again.err and "4 were there before" in again.err
    # What is missing is drawn again, and the same; a new prompt is drawn for all.
    tuned = count(monkeypatch, tuning, "tune")
    lost = tmp_path / first.lines[3]
    lost.unlink()
    assert batch(*arguments).lines == [first.lines[3]]
    assert pictures(tmp_path / "out") == before
    more = batch(*arguments, "-p", PROMPTS[1])
    assert len(more.lines) == 4 and not set(more.lines) & set(first.lines)
    assert tuned == []  # the weights are those in the cache
    # The folder can be moved.
    (tmp_path / "out").rename(tmp_path / "moved")
    assert batch(*arguments[:-1], "moved").out == ""


def test_what_was_written_meanwhile_stays(batch, world, photos, tmp_path):
    """Another program's picture is not taken for a finished one, nor half a line of the manifest for one."""
    arguments = [str(world.pack), photos[0], "-p", PROMPTS[0], "-o", "out", "--seed", "4"]
    path = tmp_path / batch(*arguments).lines[0]
    whole = path.read_bytes()
    path.write_bytes(b"mine")
    manifest = tmp_path / "out" / "e4t-batch.jsonl"
    with manifest.open("a") as file:
        file.write('{"schema": 1, "ke')
    (other,) = batch(*arguments).lines
    assert path.read_bytes() == b"mine" and other == "out/ann-s-on-the-beach-4-2.png"
    assert (tmp_path / other).read_bytes() == whole
    assert batch(*arguments).out == ""


def test_force_does_it_again_in_place(batch, world, photos, tmp_path):
    arguments = [str(world.pack), *photos, "-p", PROMPTS[0], "-o", "out", "--save", "out"]
    first = batch(*arguments)
    before = pictures(tmp_path / "out")
    assert first.code == 0 and {"out/ann.e4t", "out/bob.e4t"} < set(first.lines)
    again = batch(*arguments, "--force")
    assert again.lines == first.lines and pictures(tmp_path / "out") == before
    # Without --force a file that this command did not write is not touched, and nothing begins.
    (tmp_path / "out" / "e4t-batch.jsonl").unlink()
    refused = batch(*arguments)
    assert refused.code == 2 and "ann.png: out/ann.e4t exists and is not overwritten" in refused.err
    assert pictures(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("images", "code", "failed"),
    [
        (("ann.png", "none.png", "bob.png"), 8, "jobs.jsonl:2: there is no file none.png"),
        (("broken.png", "ann.png"), 8, "jobs.jsonl:1: broken.png"),
        (("none.png", "nor.png"), 2, "jobs.jsonl:2: there is no file nor.png"),
        (("broken.png",), 3, "jobs.jsonl:1: broken.png"),
    ],
)
def test_one_photo_does_not_stop_the_others(batch, world, photos, tmp_path, images, code, failed):
    (tmp_path / "broken.png").write_bytes((tmp_path / "ann.png").read_bytes()[:200])
    jobs = write_jobs(tmp_path, *({"domain": str(world.pack), "image": one} for one in images))
    ended = batch(jobs, "-p", PROMPTS[0])
    assert ended.code == code, ended.err
    assert failed in ended.err and "Traceback" not in ended.err
    assert len(ended.lines) == len(set(images) & set(photos))
    again = batch(jobs, "-p", PROMPTS[0])
    assert again.code == code and again.out == ""


def test_a_failing_tuning_does_not_stop_the_others(batch, world, photos, monkeypatch):
    from e4t_cli.api.session import Session

    whole, calls = Session.tune, []

    def tune(self, concept, **options):
        calls.append(concept)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return whole(self, concept, **options)

    monkeypatch.setattr(Session, "tune", tune)
    ended = batch(str(world.pack), *photos, "-p", PROMPTS[0])
    assert ended.code == 8 and len(ended.lines) == 1
    assert "ann.png: unexpected ZeroDivisionError: a bug" in ended.err


def test_a_full_disk_stops_all(batch, world, photos, monkeypatch):
    import errno

    from e4t_cli.cli import batch_files

    def full(path, data, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    tuned = count(monkeypatch, e4t_cli.api.session.Session, "tune")
    monkeypatch.setattr(batch_files, "write_atomically", full)
    ended = batch(str(world.pack), *photos, "-p", PROMPTS[0])
    assert ended.code == 6 and ended.out == "" and len(tuned) == 1


GOOD = {"domain": "face", "image": "ann.png", "prompts": ["S* on the beach"]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"domain": "face",', "no JSON"),
        ("[1]", "a line is one JSON object, not a list"),
        ('{"domain": "face", "domain": "cat"}', "the same key twice"),
        ({"image": "ann.png", "prompts": ["S*"]}, "'domain' is missing"),
        ({"domain": "face", "prompts": ["S*"]}, "'image' is missing"),
        (GOOD | {"step": 3}, "no field 'step'"),
        (GOOD | {"base": "mini"}, "'base' holds for all jobs"),
        (GOOD | {"steps": "3"}, "steps: it takes a number, not a text"),
        (GOOD | {"steps": 2.5}, "steps: it takes a whole number"),
        (GOOD | {"n": 0}, "num_images: it takes a whole number"),
        (GOOD | {"n": 1, "num_images": 2}, "'num_images' is given twice"),
        (GOOD | {"seed": -1}, "seed: it takes a whole number"),
        (GOOD | {"seed": True}, "seed: it takes a number, not true or false"),
        (GOOD | {"strict": 1}, "strict: it takes true or false"),
        (GOOD | {"image": []}, "image: it takes one or more"),
        (GOOD | {"image": [3]}, "image: it takes a text, not a number"),
        (GOOD | {"prompts": ["on the beach"]}, "does not name the concept"),
        (GOOD | {"prompts": []}, "there is no prompt"),
        (GOOD | {"prompts": [{"prompt": "S*", "size": 3}]}, "prompts: a prompt has no field 'size'"),
        (GOOD | {"prompts": [{"prompt": "S*", "steps": 0}]}, "prompts: steps: it takes a whole number"),
        (GOOD | {"domain": "faces!"}, "faces!"),
        (GOOD | {"tuning": "fast"}, "there is no tuning method 'fast'"),
        (GOOD | {"scheduler": "fast"}, "'fast'"),
        (GOOD | {"face": "top"}, "face"),
        (GOOD | {"keep_weights": True}, 'keep_weights needs a file'),
        (GOOD | {"negative_prompt": "S*"}, "the negative prompt 'S*' names the concept"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_before_anything_is_loaded(run, photos, tmp_path, monkeypatch, line, said):
    loads = count(monkeypatch, TextToImageModel, "load")
    jobs = write_jobs(tmp_path, GOOD, "", line)
    ended = run("batch", jobs, "--base", "mini", "-o", "out")
    assert ended.code == 2, ended.err
    (message,) = (one for one in ended.err.splitlines() if one.startswith("error:"))
    assert message.startswith("error: jobs.jsonl:3: ") and said in message
    assert loads == [] and ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["face"], "there is no file face"),
        (["ann.png", "bob.png", "-p", "S*"], "the domain comes before it"),
        (["face", "ann.png"], "there is no prompt"),
        (["face", "ann.png", "-p", "S*", "-o", "x.png"], "a batch needs"),
        (["face", "-", "-p", "S*"], "no stream"),
        (["face", "empty", "-p", "S*"], "has no photos"),
        (["jobs.jsonl", "--save", "x"], "--save is for photos"),
    ],
)
def test_arguments_that_cannot_be(run, photos, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    write_jobs(tmp_path, GOOD)
    ended = run("batch", *arguments)
    assert ended.code in (2, 3) and said in ended.err


def test_a_file_without_jobs(run, tmp_path):
    (tmp_path / "jobs.jsonl").write_text("\n\n")
    ended = run("batch", "jobs.jsonl")
    assert ended.code == 3 and "has no jobs" in ended.err


def test_paths_are_relative_to_the_file(batch, world, photos, tmp_path):
    (tmp_path / "set").mkdir()
    for name in photos:
        (tmp_path / name).rename(tmp_path / "set" / name)
    line = {
        "domain": str(world.pack),
        "image": photos,
        "prompts": PROMPTS[0],
        "out": "made",
        "name": "both",
        "seed": 1,
    }
    (tmp_path / "set" / "jobs.jsonl").write_text(json.dumps(line))
    ended = batch("set/jobs.jsonl", "-o", "unused")
    assert ended.lines == ["set/made/both-s-on-the-beach-1.png"]
    assert read_records((tmp_path / ended.lines[0]).read_bytes())[0].other_photos_sha256
    folder = batch(str(world.pack), "set", "-p", PROMPTS[0], "-o", "out")
    assert folder.code == 0 and len(folder.lines) == 2


def test_a_dry_run_prints_the_whole_plan(batch, world, photos, tmp_path, monkeypatch):
    jobs = write_jobs(tmp_path, *({"domain": str(world.pack), "image": one, "n": 2} for one in (*photos, "none.png")))
    loads = count(monkeypatch, TextToImageModel, "load")
    ended = batch(jobs, "-p", PROMPTS[0], "--dry-run", "--json")
    (plan,) = map(json.loads, ended.lines)
    assert ended.code == 0 and loads == [] and not (tmp_path / "outputs").exists()
    assert [(one["images"], one["finished"], "error" in one) for one in plan["jobs"]] == [
        (2, 0, False), (2, 0, False), (0, 0, True),
    ]  # fmt: skip
    assert (plan["images"], plan["failing"], plan["base"]) == (4, 1, "tiny")
    shown = batch(jobs, "-p", PROMPTS[0], "--dry-run")
    assert "jobs.jsonl:3: there is no file none.png" in shown.out


def test_an_interrupt_stops_after_the_images_in_work(batch, world, photos, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]} --steps 3\n")  # two batches of the denoiser
    arguments = [str(world.pack), *photos, "-f", "prompts.txt", "-o", "out"]
    save = BatchSaver.on_image

    def interrupted(self, job, key, image):
        save(self, job, key, image)
        assert console.current().stop.ask()  # as the handler of SIGINT does; True: the work ends by itself

    monkeypatch.setattr(BatchSaver, "on_image", interrupted)
    cut = batch(*arguments)
    assert cut.code == 130 and len(cut.lines) == 1 and "the same command continues" in cut.err
    monkeypatch.setattr(BatchSaver, "on_image", save)
    rest = batch(*arguments)
    assert rest.code == 0 and len(rest.lines) == 3
    assert len(pictures(tmp_path / "out")) == 4


def test_the_same_photo_twice_is_done_once(batch, world, photos, tmp_path):
    line = {"domain": str(world.pack), "image": photos[0]}
    ended = batch(write_jobs(tmp_path, line, line), "-p", PROMPTS[0])
    assert ended.code == 0 and len(ended.lines) == 1


def test_withheld_images_are_counted_and_not_tried_again(run, world, photos, checked_base, monkeypatch, tmp_path):
    from e4t_cli.models.loading import SafetyChecker

    checks = count(monkeypatch, SafetyChecker, "of_base")
    monkeypatch.setattr(SafetyChecker, "flags", lambda self, images: [True])
    few = ["-p", PROMPTS[0], "--base", str(checked_base), "--steps", "2", "--tune-steps", "1"]
    ended = run("batch", str(world.pack), *photos, *few)
    assert ended.code == 8 and ended.out == "" and "withheld 2 of 2" in ended.err and len(checks) == 1
    assert run("batch", str(world.pack), *photos, *few).code == 0
    without = run("batch", str(world.pack), *photos, *few, "--no-safety-checker")
    assert without.code == 0 and len(without.lines) == 2


def test_python(world, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {"sampling": {"steps": 2}, "options": {"tune_steps": 1}, "domain": world.pack, "prompts": PROMPTS[0]}
    jobs = [e4t_cli.Job(image=one, seed=2, source=one, **few) for one in (*photos, "none.png")]
    first, second, failed = e4t_cli.personalize_many(jobs, base=str(world.base), device="cpu")
    assert failed.error.message == "none.png: there is no file none.png" and failed.result is None
    single = e4t_cli.personalize(
        world.pack,
        photos[1],
        PROMPTS[0],
        seed=2,
        base=str(world.base),
        device="cpu",
        sampling={"steps": 2},
        tune_steps=1,
    )
    (one,), (other,) = single.images, second.result.images
    assert png_bytes(one.image, one.record) == png_bytes(other.image, other.record)
    assert first.result.images[0].image != other.image
    with pytest.raises(UsageError, match="here: there is no prompt"):
        e4t_cli.personalize_many([e4t_cli.Job(domain=world.pack, image="ann.png", source="here")])


def test_the_manifests_of_all_processes_are_read(tmp_path):
    for rank in (0, 2):
        Manifest(tmp_path, rank).add(f"key {rank}", tmp_path / f"{rank}.png", size=2)
        (tmp_path / f"{rank}.png").write_bytes(b"ab")
    found = Manifest(tmp_path, 1)
    assert [found.path_of(f"key {rank}") for rank in (0, 1, 2)] == [tmp_path / "0.png", None, tmp_path / "2.png"]
    (tmp_path / "2.png").write_bytes(b"abc")  # no longer the file that was written
    assert found.path_of("key 2") is None


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    import accelerate

    from e4t_cli.pretraining.batches import init_distributed

    class Alone:
        process_index, num_processes, device = 0, 1, None

        def __init__(self, **options):
            pass

        def destroy_process_group(self):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", Alone)
    with pytest.raises(UsageError, match="started 2 processes, and this one knows of 1"), init_distributed("cpu"):
        pass


@pytest.mark.slow
def test_two_processes_share_the_jobs(world, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    jobs = write_jobs(
        tmp_path, *({"domain": str(world.pack), "image": one, "seed": 1} for one in (*photos, "broken.png"))
    )  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["batch", jobs, "-p", PROMPTS[0], "--base", str(world.base), "--steps", "2", "--tune-steps", "1"]

    def launch():
        command = [*launcher, "-m", "e4t_cli", *words, "--device", "cpu"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    ended = launch()
    assert sorted(ended.stdout.splitlines()) == [f"outputs/{one}-s-on-the-beach-1.png" for one in ("ann", "bob")]
    assert "2 of 3 jobs, 2 images" in ended.stderr and ended.stderr.count("error: 1 of 3 jobs failed") == 1
    assert ended.returncode != 0
    again = launch()
    assert again.stdout == "" and "2 were there before" in again.stderr
