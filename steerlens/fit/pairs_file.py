"""Contrast texts from a table: csv, tab-separated, or JSON lines, with the names of columns that people use."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Names of columns, case ignored; the first of each that a table has counts.
POSITIVE = ("positive", "pos", "chosen", "wanted", "good", "with", "yes")
NEGATIVE = ("negative", "neg", "rejected", "unwanted", "bad", "without", "no")
PROMPT = ("prompt", "question", "instruction", "input")
#: A table with one text a row: which side it is on.
TEXT, LABEL = ("text", "sentence", "completion"), ("label", "side", "class")
SIDES = {name: True for name in ("1", "true", *POSITIVE)} | {name: False for name in ("0", "-1", "false", *NEGATIVE)}

Row = tuple[str, Mapping[str, Any]]


def read_texts(
    path: str | Path, *, positive: str | None = None, negative: str | None = None, prompt: str | None = None
) -> tuple[list[Any], list[Any]]:
    """Positive and negative texts of a file; see `Pairs.from_file`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no table of texts; the message names the line, or the columns that there are.
    """
    rows = _rows(Path(path))
    if not rows:
        raise ValueError(f"{path} holds no pairs: it has no row with a text")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    asked = {"positive": positive, "negative": negative, "prompt": prompt}
    chosen = {
        option: _column(path, option, wish, known, names)
        for (option, wish), known in zip(asked.items(), (POSITIVE, NEGATIVE, PROMPT), strict=True)
    }
    before = chosen["prompt"]
    if chosen["positive"] and chosen["negative"]:
        sides = (chosen["positive"], chosen["negative"])
        found = [[_text(where, row, side, before) for where, row in rows] for side in sides]
        return found[0], found[1]
    text, label = (_column(path, "", None, known, names) for known in (TEXT, LABEL))
    if text is None or label is None or positive or negative:
        missing = " and ".join(side for side in ("positive", "negative") if not chosen[side])
        raise ValueError(
            f"{path} has no column for the {missing} texts; its columns are {_named(names)} (the first line names "
            "them). Rename them to positive and negative, or name yours: --positive COLUMN --negative COLUMN "
            "(positive=, negative= in Python)"
        )
    both: tuple[list[Any], list[Any]] = ([], [])
    for where, row in rows:
        both[0 if _side(where, row.get(label), label) else 1].append(_text(where, row, text, before))
    for side, texts in zip(("positive", "negative"), both, strict=True):
        if not texts:
            raise ValueError(f"{path}: no row's {label!r} says {side}; contrast needs texts on both sides")
    return both


def _column(path: Any, option: str, wish: str | None, known: Sequence[str], names: Sequence[str]) -> str | None:
    """The name of a column: the one asked for, or the first that is known."""
    if wish is not None:
        if wish not in names:
            raise ValueError(f"{path} has no column {wish!r} for {option}; its columns are {_named(names)}")
        return wish
    plain = {name.strip().casefold(): name for name in reversed(names)}
    return next((plain[name] for name in known if name in plain), None)


def _text(where: str, row: Mapping[str, Any], side: str, prompt: str | None) -> Any:
    text = row.get(side)
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{where} has no {side!r}; give both texts of a pair, or leave the line out")
    messages = isinstance(text, list) and text and all(isinstance(entry, dict) and "role" in entry for entry in text)
    if not isinstance(text, str) and not messages:
        raise ValueError(f"{where}: its {side!r} is {json.dumps(text)[:60]}; give a text or a list of chat messages")
    if prompt is None or messages:
        return text
    before = row.get(prompt)
    if not isinstance(before, str) or not before:
        raise ValueError(f"{where} has no {prompt!r}; give each completion its prompt, or leave that column out")
    # a cell of a table seldom carries the space that joins it to its prompt
    joined = before[-1].isspace() or text[0].isspace()
    return before, text if joined else f" {text}"


def _side(where: str, label: Any, name: str) -> bool:
    word = str(label).strip().casefold()
    if word not in SIDES:
        raise ValueError(f"{where}: its {name!r} is {label!r}; it is positive or negative, 1 or 0, true or false")
    return SIDES[word]


def _rows(path: Path) -> list[Row]:
    """What a message calls each row, and its cells by column; rows without any text are left out."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a csv or jsonl file of pairs")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark before the first column's name
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; give a csv or jsonl file of pairs") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, in a spreadsheet as 'CSV UTF-8'"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is no text file; give a csv or jsonl file of pairs")
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "["):
        return _json_rows(path, text)
    return _csv_rows(path, text)


def _json_rows(path: Path, text: str) -> list[Row]:
    entries: list[tuple[str, Any]] = []
    if text.lstrip().startswith("["):
        entries = [(f"{path}, entry {number}", row) for number, row in enumerate(_json(path, text), start=1)]
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                entries.append((f"{path}, line {number}", _json(f"{path}, line {number},", line)))
    for where, row in entries:
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no JSON object; write {{"positive": "...", "negative": "..."}}')
    return [(where, row) for where, row in entries if row]


def _json(where: Any, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{where} is no JSON ({error}); write {{"positive": "...", "negative": "..."}}') from None


def _csv_rows(path: Path, text: str) -> list[Row]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    # a semicolon is what spreadsheets write in half of Europe
    delimiter = max(("\t", ";", ","), key=first.count) if path.suffix.lower() != ".tsv" else "\t"
    reader: Any = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True, restval="")
    found: list[Row] = []
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a column twice: {_named(names)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                count = len(names) + len(row[None])
                raise ValueError(
                    f"{where} has {count} cells for {len(names)} columns; put a text that holds {delimiter!r} in "
                    'double quotes: "..."'
                )
            if any(cell.strip() for cell in row.values()):
                found.append((where, row))
    except csv.Error as error:
        raise ValueError(
            f'{path}, line {reader.line_num} is no csv ({error}); a quote inside a text is written twice: ""'
        ) from None
    return found


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:12])
    return shown + (", ..." if len(names) > 12 else "")
