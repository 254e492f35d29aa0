"""Contrast pairs from csv and JSON lines: the columns that people use, and one sentence for each mistake."""

from __future__ import annotations

import csv
import json
import re

import pytest

import steerlens as sl


@pytest.fixture
def write(tmp_path):
    def make(text, name="pairs.csv", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return sl.Pairs.from_file(path, **options)

    return make


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("positive,negative\na b,c\nd,e\n", "pairs.csv"),
        ("\ufeffPositive , NEGATIVE\r\na b,c\r\nd,e\r\n", "pairs.csv"),
        ("id;chosen;rejected\n1;a b;c\n2;d;e\n", "pairs.csv"),
        ("pos\tneg\na b\tc\nd\te\n", "pairs.tsv"),
        ("positive\tnegative\na b\tc\nd\te\n", "pairs.txt"),
        ("positive,negative\na b,c\n,\n\nd,e\n,\n", "pairs.csv"),
        ('{"positive": "a b", "negative": "c"}\n\n{"positive": "d", "negative": "e"}\n', "pairs.jsonl"),
        ('[{"good": "a b", "bad": "c"}, {"good": "d", "bad": "e"}]', "pairs.json"),
        ("text,label\na b,1\nc,0\ne,0\nd,1\n", "pairs.csv"),
        ("label,sentence\nPositive,a b\nneg,c\nfalse,e\nTrue,d\n", "pairs.csv"),
        (",positive,negative\n0,a b,c\n1,d,e\n", "pairs.csv"),
    ],
)
def test_columns_that_people_use(write, text, name):
    pairs = write(text, name)
    assert (pairs.positive, pairs.negative, pairs.read) == (["a b", "d"], ["c", "e"], "mean")


def test_texts_survive_whatever_they_hold(write, tmp_path):
    texts = [('He said "no", twice', "a;b\tc"), ("two\nlines", "l'été"), ("=1+1", " spaces ")]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("positive", "negative"), *texts])
    pairs = sl.Pairs.from_file(tmp_path / "x.csv")
    assert list(zip(pairs.positive, pairs.negative, strict=True)) == texts


def test_prompts_make_completions(write):
    pairs = write("question,yes,no\nTea?,Gladly.,No.\n")
    assert (pairs.positive, pairs.negative) == ([("Tea?", " Gladly.")], [("Tea?", " No.")])
    assert pairs.read == "completion"
    rows = '{"q": "Tea? ", "a": "Gladly.", "b": " No."}\n'
    pairs = write(rows, "x.jsonl", positive="a", negative="b", prompt="q", read="last")
    assert (pairs.positive, pairs.negative, pairs.read) == ([("Tea? ", "Gladly.")], [("Tea? ", " No.")], "last")
    messages = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes"}]
    assert write(json.dumps({"positive": messages, "negative": messages}), "x.jsonl").positive == [messages]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no pairs"),
        ("positive,negative\n", "holds no pairs: it has no row with a text"),
        ("positive,negative\n,\n , \n", "holds no pairs"),
        ("a,b\nx,y\n", "no column for the positive and negative texts; its columns are 'a', 'b'"),
        ("positive,b\nx,y\n", "no column for the negative texts; its columns are 'positive', 'b'"),
        ("I love it,I hate it\nx,y\n", "its columns are 'I love it', 'I hate it' (the first line names them)"),
        ("positive,negative\na,b\nc,\n", "line 3 has no 'negative'; give both texts of a pair"),
        ("positive,negative\n,b\n", "line 2 has no 'positive'"),
        ("positive,negative\nHello, you,b\n", "line 2 has 3 cells for 2 columns; put a text that holds ','"),
        ('positive,negative\n"a" b,c\n', "is no csv"),
        ("positive,positive\na,b\n", "names a column twice"),
        ("prompt,positive,negative\n,a,b\n", "line 2 has no 'prompt'"),
        ("text,label\na,1\nb,maybe\n", "line 3: its 'label' is 'maybe'; it is positive or negative"),
        ("text,label\na,1\nb,1\n", "no row's 'label' says negative"),
        (b"positive,negative\ncaf\xe9,b\n", "is not UTF-8 text (byte 21)"),
        (b"PK\0\0", "is no text file"),
        ('{"positive": "a"}\n', "no column for the negative texts"),
        ('{"positive": "a", "negative": "b"}\n{"positive": "a"}\n', "line 2 has no 'negative'"),
        ('{"positive": "a", "negative": "b"}\n{oops\n', "line 2, is no JSON"),
        ('{"positive": 3, "negative": "b"}\n', "line 1: its 'positive' is 3; give a text or a list of chat messages"),
        ('[["a", "b"]]', "entry 1 is no JSON object"),
    ],
)
def test_each_mistake_gets_one_sentence(write, text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as found:
        write(text)
    assert "\n" not in str(found.value)


def test_a_column_that_is_not_there(write):
    with pytest.raises(ValueError, match=r"no column 'wished' for positive; its columns are 'positive', 'negative'"):
        write("positive,negative\na,b\n", positive="wished")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        sl.Pairs.from_file("nowhere.csv")
