"""`--tuning` and `--vram` on the command line."""

from e4t_cli.formats.concept import Concept
from tests.cli.test_cli_work import install, pixels


def test_adapters_make_a_small_concept_that_is_drawn_again(run, world):
    first = run(
        *world.personalize(
            "--tuning", "lora", "--save", "me.e4t", "--keep-weights", "--seed", "7", "-v",
            "--vram", "6",
        )
    )  # fmt: skip
    assert first.code == 0, first.err
    assert "memory: " in first.err and "at a time" in first.err
    concept = Concept.load("me.e4t")
    assert concept.config.method == "lora"
    assert all(key.startswith("adapters.") for key in concept.weights)
    install(world)
    again = run(
        "generate", "me.e4t", "S* on the beach", "--base", str(world.base), "--steps", "2",
        "--seed", "7", "-o", "again",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert "tune" not in again.err.partition("seed 7")[0]
    assert pixels(again.lines[0]) == pixels(first.lines[1])


def test_the_plan_is_for_those_who_ask(run, world):
    assert "memory: " not in run(*world.personalize("--seed", "7")).err


def test_what_cannot_be_meant_is_said_before_the_work(run, world):
    for option, value, said in (
        ("--tuning", "magic", "full or lora"),
        ("--vram", "lots", "--vram 8"),
        ("--vram", "-3", "--vram 8"),
    ):
        ended = run(*world.personalize(option, value))
        assert ended.code == 2
        assert said in ended.err and not ended.out
