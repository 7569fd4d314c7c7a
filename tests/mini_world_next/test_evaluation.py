"""The evaluation of a finished base: which methods are measured, that it stops and goes on, and what it leaves."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from e4t_cli.registry.config import TuningConfig
from e4t_cli.schedulers import SamplingConfig
from mini_world.next import evaluate, evaluation
from mini_world.next.evaluation import (
    StoppableRows,
    evaluate_domain,
    evaluate_words,
    methods_of,
    write_domains,
    write_words,
)
from mini_world.next.judge import Judge
from mini_world.next.loop import Unfinished
from mini_world.next.stopping import STOP_AT
from mini_world.next.tasks import Word

SAMPLING = SamplingConfig(steps=2)
WORD = Word("cat", "place", "a cat on the beach", {"place": "beach"})
TUNING = TuningConfig(steps=5, base_learning_rate=1e-5, reg_weight=1e-4)
PRETRAINED = SimpleNamespace(descriptor="cat", tuning=TUNING)


@pytest.fixture
def calls(monkeypatch):
    """Images are the photo, and nothing is trained; returns how often each method was asked to draw."""
    found = []
    white = evaluate.held_out_photos("cat", 1, 3)[0].image

    def generate(model, tuned, tasks, seed, *, rare="", sampling=None):
        assert sampling is SAMPLING
        found.append((tuned, seed))
        return [white] * len(tasks)

    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "overrides_of", lambda who: ())
    monkeypatch.setattr(evaluate, "sample", lambda model, plain, prompts, seeds, sampling, batch: [white] * len(seeds))
    monkeypatch.setattr(evaluate, "base_words", lambda kind: [WORD])
    monkeypatch.setattr(evaluate.TunedModel, "plain", lambda model, word: "plain")
    monkeypatch.setattr(evaluation, "tune", lambda model, pretrained, prepared, config, seed: f"{config.steps} steps")
    return found


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge((8, 8, 8, 8, 8, 8)).eval()


def test_an_evaluation_is_stopped_after_a_row_and_goes_on(tmp_path, calls, judge, monkeypatch):
    monkeypatch.setenv(STOP_AT, "0")
    for number in range(2, 4):
        with pytest.raises(Unfinished, match="the same command goes on"):
            evaluate_domain(tmp_path, None, judge, PRETRAINED, "cat", 1, SAMPLING)
        methods = {json.loads(line)["method"] for line in (tmp_path / "cat.jsonl").read_text().splitlines()}
        assert len(methods) == number - 1
    assert calls == []  # drawings are first
    monkeypatch.delenv(STOP_AT)
    rows = evaluate_domain(tmp_path, None, judge, PRETRAINED, "cat", 1, SAMPLING)
    assert {tuned for tuned, _ in calls} == {"plain", "0 steps", "5 steps"}
    assert {seed for _, seed in calls} == {1000 * evaluation.SEED}  # the same noise for all methods
    assert list(dict.fromkeys(row["method"] for row in rows.rows))[-3:] == ["plain word", "encoder alone", "5 steps"]
    assert evaluate_domain(tmp_path, None, judge, PRETRAINED, "cat", 1, SAMPLING).rows == rows.rows and len(calls) == 3


def test_tables_and_rows_are_the_result(tmp_path, calls, judge):
    rows = evaluate_domain(tmp_path / "rows", None, judge, PRETRAINED, "cat", 1, SAMPLING)
    words = evaluate_words(tmp_path / "rows", None, judge, ("cat",), 3, SAMPLING)
    assert len(words.rows) == 3 and words.rows[0]["kind"] == "cat"
    (tmp_path / "made").mkdir()
    assert write_domains(tmp_path / "made", {"cat": rows}) == {"cat": len(rows.rows)}
    assert write_words(tmp_path / "made", words) == {"images": 3}
    page = (tmp_path / "made" / "domains.md").read_text()
    assert "## cat" in page and "| encoder alone |" in page and "| mean absolute error | width | tint |" in page
    assert "| cat | place | a cat on the beach |" in (tmp_path / "made" / "words.md").read_text()
    stored = gzip.decompress((tmp_path / "made" / "cat.jsonl.gz").read_bytes())
    assert [json.loads(line) for line in stored.splitlines()] == rows.rows


def test_tuning_has_the_domains_length(calls):
    methods = methods_of(None, SimpleNamespace(descriptor="face", tuning=TUNING.replace(steps=15)))
    assert list(methods) == ["plain word", "encoder alone", "15 steps"]
    assert methods["encoder alone"].tune(None, 1) == "0 steps" and methods["15 steps"].tune(None, 1) == "15 steps"
    assert not any(method.rare for method in methods.values())


def test_without_a_limit_nothing_is_stopped(tmp_path, monkeypatch):
    monkeypatch.delenv(STOP_AT, raising=False)
    rows = StoppableRows(tmp_path / "rows.jsonl")
    rows.append([{"number": 1}])
    assert rows.rows == [{"number": 1}]
