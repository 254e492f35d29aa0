"""Loaders of public sets, on small files written by hand in the formats in which their authors publish them."""

from __future__ import annotations

import csv
import json

import pytest

import steerlens as sl
from steerlens.evaluate import datasets


@pytest.fixture
def written(tmp_path):
    def write(name: str, rows) -> str:
        path = tmp_path / name
        if name.endswith(".csv"):
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        elif name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        else:
            path.write_text(json.dumps(rows))
        return str(path)

    return write


ITEM = ("Q: Do stones float?\nA:", [" Most sink.", " Pumice floats."], [" All do.", " None do."])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "TruthfulQA.csv",
            {
                "Question": "Do stones float?",
                "Best Answer": "Most sink.",
                "Correct Answers": "Pumice floats.; Most sink.",
                "Incorrect Answers": "All do.; None do.",
            },
        ),
        (
            "mc_task.json",
            {
                "question": "Do stones float?",
                "mc1_targets": {"Most sink.": 1, "All do.": 0},
                "mc2_targets": {"Pumice floats.": 1, "Most sink.": 1, "All do.": 0, "None do.": 0},
            },
        ),
        (
            "hub.jsonl",
            {
                "question": "Do stones float?",
                "mc1_targets": {"choices": ["Most sink.", "All do."], "labels": [1, 0]},
                "mc2_targets": {
                    "choices": ["Pumice floats.", "Most sink.", "All do.", "None do."],
                    "labels": [1, 1, 0, 0],
                },
            },
        ),
        (
            "flat.jsonl",
            {
                "question": "Do stones float?",
                "mc1_choices": ["Most sink.", "All do."],
                "mc1_label": 0,
                "mc2_true": ["Pumice floats.", "Most sink."],
                "mc2_false": ["All do.", "None do."],
            },
        ),
    ],
)
def test_truthfulqa_has_the_best_answer_first_in_every_format(written, name, row):
    assert datasets.truthfulqa(written(name, [row])) == [ITEM]


@pytest.mark.parametrize(
    "names", [("answer_matching_behavior", "answer_not_matching_behavior"), ("match", "not_match")]
)
def test_caa_gives_questions_and_pairs(written, names):
    row = {"question": "Tea?\n\nChoices:\n (A) Yes\n (B) No", names[0]: "(B)", names[1]: "(A)"}
    items = datasets.caa(written("behaviour.json", [row]))
    assert items == [("Tea?\n\nChoices:\n (A) Yes\n (B) No\n\nAnswer:", " (B)", " (A)")]
    pairs = datasets.pairs_of(items)
    assert pairs.positive == [(items[0][0], " (B)")]
    assert pairs.negative == [(items[0][0], " (A)")]
    assert sl.evaluate.ab(items).items == ((pairs.positive[0], pairs.negative[0]),)


def test_axbench_sets_each_concept_against_the_examples_of_none(written):
    rows = [
        {"input": "Name a bird.", "output": "A gull, at sea.", "output_concept": "sea", "category": "positive"},
        {"input": "Name a day.", "output": "Monday.", "output_concept": "EEEEE", "category": "negative"},
        {"input": "Name a tool.", "output": "A harp.", "output_concept": "music", "category": "positive"},
    ]
    found = datasets.axbench(written("train_data.jsonl", rows))
    assert list(found) == ["sea", "music"]
    assert found["sea"].positive == [("Name a bird.\n", "A gull, at sea.")]
    assert found["sea"].negative == found["music"].negative == [("Name a day.\n", "Monday.")]
    with pytest.raises(ValueError, match="2 positive and 0 negative rows"):
        datasets.axbench(written("positive.jsonl", rows[::2]))
    with pytest.raises(ValueError, match=r"row 0 of .* has category 'hard negative'"):
        datasets.axbench(written("hard.jsonl", [rows[0] | {"category": "hard negative"}]))


def test_toxicity_prompts_in_both_formats(written):
    published = [
        {"challenging": True, "prompt": {"text": "You are such a", "toxicity": 0.9}},
        {"challenging": False, "prompt": {"text": "The weather is", "toxicity": 0.1}},
    ]
    path = written("prompts.jsonl", published)
    assert datasets.toxicity_prompts(path) == ["You are such a", "The weather is"]
    assert datasets.toxicity_prompts(path, challenging=True) == ["You are such a"]
    flat = written("flat.jsonl", [{"prompt": "You are such a", "category": "insult"}])
    assert datasets.toxicity_prompts(flat) == ["You are such a"]
    with pytest.raises(ValueError, match="no field 'challenging'; its fields are prompt, category"):
        datasets.toxicity_prompts(flat, challenging=True)


def test_parquet_is_read_like_the_rest(tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame([{"question": "Tea?", "match": "(A)", "not_match": "(B)"}]).to_parquet(tmp_path / "caa.parquet")
    assert datasets.caa(tmp_path / "caa.parquet", template="{question}") == [("Tea?", " (A)", " (B)")]


def test_files_of_another_kind_are_named(written, tmp_path):
    with pytest.raises(ValueError, match=r"row 0 of .* has no text in question; its fields are q"):
        datasets.caa(written("wrong.jsonl", [{"q": "Tea?"}]))
    with pytest.raises(ValueError, match="1 right and 0 wrong answers"):
        datasets.truthfulqa(written("one.jsonl", [{"question": "x", "mc2_true": ["a"], "mc2_false": []}]))
    with pytest.raises(ValueError, match="has no rows"):
        datasets.caa(written("none.json", []))
    (tmp_path / "table.xls").write_text("")
    with pytest.raises(ValueError, match=r"a \.xls file; give \.jsonl, \.json, \.csv or \.parquet"):
        datasets.caa(tmp_path / "table.xls")
