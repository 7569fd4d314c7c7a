"""`--dry-run` of `personalize` and `generate`: refuses what the run refuses, and says what it costs."""

import json
import os

import pytest

from e4t_cli.errors import IntegrityError


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--steps", "1001"], 2), (["--steps", "600", "--scheduler", "ddim"], 2), (["--scheduler", "nonsense"], 2),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], 2), (["--guidance", "500"], 2), (["--vram", "0"], 2),
        (["--dtype", "fp8"], 2), (["--device", "nonsense"], 2), (["--tuning", "some"], 2), (["--face", "x"], 2),
        (["--face", "7"], 2), (["--require-face"], 2), (["--mask", "none.png"], 2), (["--keep-weights"], 2),
        (["--base", "sd14"], 4), (["--save", "taken.e4t"], 2), (["-o", "taken.e4t/below"], 2),
        (["--placeholder", "two words"], 2), (["--negative-prompt", "no S*"], 2), (["-o", "taken.e4t"], 2),
        (["--base", "sd14", "--offline"], 4), (["--base", "owner/x", "--offline"], 4),
        (["--save", "a.e4t", "-o", "a.e4t"], 2), (["-o", "a.png", "--save-prepared", "a.png"], 2),
        (["--seed", "4294967295", "-n", "2"], 2),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_refuses(world, run, tmp_path, monkeypatch, options, code):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "taken.e4t").write_bytes(b"")
    both = [run(*world.personalize(*options, "--dry-run"))]
    assert os.listdir() == ["taken.e4t"]
    both.append(run(*world.personalize(*options)))
    assert [one.code for one in both] == [code, code], both[0].err
    if options != ["--base", "sd14"]:  # the run asks the hub first
        dry, wet = (one.err[one.err.index("error:") :] for one in both)
        assert dry == wet


def test_a_dry_run_says_what_it_costs(world, run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    common = ("personalize", "face", str(world.photo), "S* at sea", "--base", "mini", "--dry-run")
    ended = run(*common, "-n", "3", "--json")
    plan = json.loads(ended.out)
    assert (plan["type"], plan["base"], plan["images"], plan["download_bytes"]) == ("plan", "mini", 3, 0)
    assert plan["memory_bytes"]["least"] > 1e9 and 0 < plan["seconds"]["generate"] < 60
    assert not any(" " in key for key in plan)
    ended = run(*common)
    assert "memory" in ended.out and "seconds" in ended.out and ended.code == 0
    assert os.listdir() == []


def test_a_prompt_that_names_the_concept_too_late(world, run):
    late = [*world.personalize(prompts=("a photo of a dog " * 10 + "S*",))]
    both = [run(*late, *more) for more in ((), ("--dry-run",))]
    assert [one.code for one in both] == [2, 2], both[1].err
    assert all("the placeholder comes after them" in one.err for one in both)
    assert run(*world.personalize("--dry-run", prompts=("S* " + "a photo of a dog " * 10,))).code == 0


def test_a_line_of_a_file_that_names_the_concept_in_its_negative_prompt(world, run, tmp_path):
    (tmp_path / "p.txt").write_text("S* at sea\nS* at sea --neg no S*\n")
    for more in ((), ("--dry-run",)):
        ended = run(*world.personalize("-f", "p.txt", *more, prompts=()))
        assert ended.code == 2 and "error: p.txt:2: the negative prompt 'no S*' names the concept" in ended.err


def test_a_dry_run_of_the_preparation_alone(world, run, tmp_path):
    """It needs no weights of the domain, tunes nothing, and writes nothing."""
    photo, before = str(world.photo), set(os.listdir(tmp_path))
    for base in (str(world.base), "sd14"):
        common = ("personalize", "cat", photo, "--base", base, "--save-prepared", "ready")
        ended = run(*common, "--dry-run", "--json")
        assert ended.code == 0, ended.err
        plan = json.loads(ended.out)
        assert plan["folder"] == "ready" and not plan.keys() & {"tuning", "seconds", "memory_bytes"}
        assert run(*common, "--dry-run").code == 0
    assert set(os.listdir(tmp_path)) == before
    assert run(*common, "--dry-run", "--face", "left").code == run(*common, "--face", "left").code == 2


def test_nothing_is_downloaded_for_a_domain_without_weights(run, world, monkeypatch):
    """The base would be fetched first, gigabytes, for a domain that has no weights for it."""
    monkeypatch.setattr("e4t_cli.api.resolve.fetch_base", lambda *_, **__: pytest.fail("fetched"))
    ended = run("personalize", "cat", str(world.photo), "S*", "--base", "sd14")
    assert ended.code == 4 and "nobody has published any" in ended.err


def test_the_size_of_a_download(world, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    ended = run("personalize", "face", str(world.photo), "S* at sea", "--base", "sd14", "--dtype", "fp16", "--dry-run",
                "--json")  # fmt: skip
    plan = json.loads(ended.out)
    assert plan["to_fetch"] == "the base sd14 and the weights of face"
    assert plan["download_bytes"] == pytest.approx(2_740_600_000 + 4_021_900_000, rel=1e-3)  # docs/rehearsal.md


def test_generate_has_a_dry_run(world, run, tmp_path, monkeypatch):
    assert run("domains", "add", str(world.pack)).code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*world.personalize("--save", "me.e4t", "-o", ".", prompts=())).code == 0
    common = ("generate", "me.e4t", "S* at sea", "--base", str(world.base))
    ended = run(*common, "-n", "2", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["images"] == 2
    assert os.listdir() == ["me.e4t"]
    for wrong in (["--steps", "1001"], ["--scheduler", "x"], ["-o", "me.e4t/x"]):
        assert run(*common, *wrong, "--dry-run").code == run(*common, *wrong).code == 2
    assert run("generate", "me.e4t", "nobody", "--base", str(world.base), "--dry-run").code == 2


def test_another_base_is_refused_by_its_name():
    from types import SimpleNamespace

    from e4t_cli.api.resolve import check_concept_base

    concept = SimpleNamespace(base_name="mini")
    for same in ("auto", "mini", "some/folder", "."):
        check_concept_base(concept, same)
    for other in ("sd14", "CompVis/stable-diffusion-v1-4"):
        with pytest.raises(IntegrityError, match="on the base mini, not on sd14"):
            check_concept_base(concept, other)


def test_the_memory_of_a_plan_is_that_of_the_planner():
    from e4t_cli.api.plans import FETCHED, MEMORY, SECONDS
    from e4t_cli.hub.bases import EMBEDDED, PUBLISHED

    assert set(FETCHED) == set(PUBLISHED) and set(MEMORY) == set(SECONDS) == {*EMBEDDED, "accelerator", "cpu"}
