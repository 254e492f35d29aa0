"""The field's public sets, read from files that the user has: steerlens ships texts of its own only.

| loader | set | licence |
| --- | --- | --- |
| `truthfulqa` | TruthfulQA (Lin et al. 2022) | Apache-2.0 |
| `caa` | behaviours of CAA (Rimsky et al. 2024), partly from Anthropic's model-written evaluations (CC BY 4.0) | MIT |
| `axbench` | AxBench's concept10 and concept500 (Wu et al. 2025) | Apache-2.0 |
| `toxicity_prompts` | RealToxicityPrompts (Gehman et al. 2020) | Apache-2.0 |

Files are JSON lines, JSON, CSV, or Parquet (needs pandas and pyarrow), as the authors publish them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from steerlens.fit.contrast import Pairs, Read

#: A question, right answers (the best first) and wrong answers: an item of `mc`.
Choice = tuple[str, list[str], list[str]]
#: A question, the matching answer and the other: an item of `ab` and `propensity`.
Question = tuple[str, str, str]


def truthfulqa(path: str | Path, *, template: str = "Q: {question}\nA:") -> list[Choice]:
    """TruthfulQA as items of `mc`: question, right answers with the best first, wrong answers.

    Reads the authors' `TruthfulQA.csv` and `mc_task.json` and the hub's rows. Answers begin with a space.

    Args:
        path: The file.
        template: What stands around a question.

    Raises:
        ValueError: a row without a question or without right and wrong answers.
    """
    items = []
    for number, row in _numbered(path):
        question = _field(row, number, path, "question", "Question")
        right, wrong = _answers(row, number, path)
        if not right or not wrong:
            raise ValueError(f"row {number} of {path} has {len(right)} right and {len(wrong)} wrong answers")
        items.append(
            (template.format(question=question), [f" {text}" for text in right], [f" {text}" for text in wrong])
        )
    return items


def caa(path: str | Path, *, template: str = "{question}\n\nAnswer:") -> list[Question]:
    """A behaviour of CAA as items of `ab` and `propensity`: question, matching answer, other answer.

    Reads the authors' JSON (`question`, `answer_matching_behavior`, `answer_not_matching_behavior`). Answers begin with
    a space. `pairs_of(caa(path))` is what a controller is fitted on.

    Args:
        path: The file.
        template: What stands around a question.
    """
    return [
        (
            template.format(question=_field(row, number, path, "question").strip()),
            " " + _field(row, number, path, "answer_matching_behavior", "match").strip(),
            " " + _field(row, number, path, "answer_not_matching_behavior", "not_match").strip(),
        )
        for number, row in _numbered(path)
    ]


def axbench(path: str | Path, *, read: Read = "completion") -> dict[str, Pairs]:
    """AxBench's concepts: for each its examples against the examples of no concept, as prompt and completion.

    Reads rows with `input`, `output`, `output_concept` and `category` (`"positive"` or `"negative"`), as the authors'
    `train_data.parquet`. The sides are not paired by content and differ in number.

    Args:
        path: The file.
        read: As in `Pairs`.

    Raises:
        ValueError: no row is positive, or none is negative.
    """
    positive: dict[str, list[tuple[str, str]]] = {}
    negative: list[tuple[str, str]] = []
    for number, row in _numbered(path):
        text = (
            _field(row, number, path, "input", "instruction").strip() + "\n",
            _field(row, number, path, "output").strip(),
        )
        category = _field(row, number, path, "category")
        if category not in ("positive", "negative"):
            raise ValueError(f"row {number} of {path} has category {category!r}; it is positive or negative")
        if category == "negative":
            negative.append(text)
        else:
            positive.setdefault(_field(row, number, path, "output_concept", "concept"), []).append(text)
    if not positive or not negative:
        count = sum(map(len, positive.values()))
        raise ValueError(f"{path} has {count} positive and {len(negative)} negative rows; contrast needs both")
    return {concept: Pairs(texts, negative, read=read) for concept, texts in positive.items()}


def toxicity_prompts(path: str | Path, *, challenging: bool = False) -> list[str]:
    """Prompts of RealToxicityPrompts, to be continued. The texts are toxic.

    Reads the authors' `prompts.jsonl` (`prompt` an object with `text`) and rows whose `prompt` is a string.

    Args:
        path: The file.
        challenging: Only the rows that the authors mark so.
    """
    found = []
    for number, row in _numbered(path):
        if challenging and "challenging" not in row:
            raise ValueError(f"row {number} of {path} has no field 'challenging'; its fields are {', '.join(row)}")
        if challenging and not row["challenging"]:
            continue
        prompt = row.get("prompt")
        found.append(_field(prompt if isinstance(prompt, dict) else row, number, path, "text", "prompt"))
    return found


def pairs_of(items: Iterable[Question], *, read: Read = "completion") -> Pairs:
    """Contrast pairs from items `(prompt, wanted, unwanted)`.

    Args:
        items: As `caa` returns them.
        read: As in `Pairs`.
    """
    items = list(items)
    wanted, unwanted = ([(item[0], item[side]) for item in items] for side in (1, 2))
    return Pairs(wanted, unwanted, read=read)


def _answers(row: dict[str, Any], number: int, path: str | Path) -> tuple[list[str], list[str]]:
    if "mc2_targets" in row:
        labelled = _labelled(row["mc2_targets"])
        best = next((text for text, right in _labelled(row.get("mc1_targets", {})) if right), None)
        right, wrong = ([text for text, label in labelled if bool(label) is kind] for kind in (True, False))
    elif "mc2_true" in row:
        best = row["mc1_choices"][row["mc1_label"]] if "mc1_choices" in row else None
        right, wrong = list(row["mc2_true"]), list(row["mc2_false"])
    else:
        best = row.get("Best Answer")
        right, wrong = (_split(_field(row, number, path, name)) for name in ("Correct Answers", "Incorrect Answers"))
    return ([best] if best else []) + [text for text in right if text != best], wrong


def _labelled(targets: Any) -> list[tuple[str, int]]:
    """Answers and labels: `{answer: label}` in the authors' file, `{choices, labels}` on the hub."""
    if "choices" in targets:
        return list(zip(targets["choices"], targets["labels"], strict=True))
    return list(targets.items())


def _split(answers: str) -> list[str]:
    return [text.strip() for text in answers.split(";") if text.strip()]


def _field(row: dict[str, Any], number: int, path: str | Path, *names: str) -> str:
    for name in names:
        if isinstance(row.get(name), str) and row[name].strip():
            return row[name]
    raise ValueError(f"row {number} of {path} has no text in {' or '.join(names)}; its fields are {', '.join(row)}")


def _numbered(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    rows = _rows(Path(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return enumerate(rows)


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    raise ValueError(f"{path} is a {path.suffix or 'nameless'} file; give .jsonl, .json, .csv or .parquet")
