"""The texts that come with steerlens: enough of them, different ones, and halves that share none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import steerlens as sl

COMPLETIONS = ("certainty", "compliance", "formality", "sentiment")
CONCEPTS = ("anger", "french", "ocean", "wedding")
TEXTS = ("instructions", "neutral", "prompts")
SETS = COMPLETIONS + CONCEPTS


def whole(text) -> str:
    return text if isinstance(text, str) else text[0] + text[1]


def sides(name: str, split: str | None = None) -> tuple[list[str], list[str]]:
    pairs = sl.shipped(name, split=split)
    return [whole(text) for text in pairs.positive], [whole(text) for text in pairs.negative]


def skeleton(text: str) -> str:
    """A text without its longest words: what texts filled into one template have in common."""
    words = text.lower().split()
    kept = sorted(range(len(words)), key=lambda index: len(words[index]))[: max(1, len(words) - 2)]
    return " ".join(words[index] for index in sorted(kept))


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_forty_pairs_in_equal_halves_without_a_common_text(name):
    halves = {split: sl.shipped(name, split=split) for split in ("dev", "held_out")}
    assert len(halves["dev"]) == len(halves["held_out"]) >= 20
    assert len(sl.shipped(name)) == len(halves["dev"]) + len(halves["held_out"]) >= 40
    (dev, held) = ({text for side in sides(name, split) for text in side} for split in ("dev", "held_out"))
    assert not dev & held
    if name in COMPLETIONS:
        prompts = [{text[0] for text in halves[split].positive} for split in ("dev", "held_out")]
        assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("name", SETS)
def test_no_text_comes_twice_or_from_a_template(name):
    positive, negative = sides(name)
    assert len({*positive, *negative}) == len(positive) + len(negative)
    for side in (positive, negative):
        assert max(Counter(map(skeleton, side)).values()) == 1


@pytest.mark.parametrize("name", SETS)
def test_the_last_words_and_signs_vary(name):
    for side in sides(name):
        signs = Counter(text[-1] if not text[-1].isalnum() else "" for text in side)
        assert len(signs) >= 2
        assert max(signs.values()) <= 0.75 * len(side)
        assert len({text.rstrip(".!?").split()[-1] for text in side}) >= 0.6 * len(side)


@pytest.mark.real_model
@pytest.mark.parametrize("name", SETS)
def test_no_token_ends_most_texts(name, smol):
    tokenizer = smol("nnsight").tokenizer
    for side in sides(name):
        last = Counter(tokenizer(text)["input_ids"][-1] for text in side)
        assert max(last.values()) <= 0.75 * len(side)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_both_completions_follow_one_prompt(name):
    pairs = sl.shipped(name, read="completion")
    assert [text[0] for text in pairs.positive] == [text[0] for text in pairs.negative]
    assert all(text[1].startswith(" ") and not text[0].endswith(" ") for text in pairs.positive + pairs.negative)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_halved_and_unique(name):
    dev, held = (sl.shipped_texts(name, split=split) for split in ("dev", "held_out"))
    assert len({*dev, *held}) == len(dev) + len(held) >= 24
    assert sl.shipped_texts(name) == dev + held


def test_neutral_texts_are_no_side_of_a_pair():
    used = {text for name in SETS for side in sides(name) for text in side}
    assert not used & set(sl.shipped_texts("neutral"))


def test_unknown_names_and_splits_list_the_known_ones():
    with pytest.raises(ValueError, match="there are anger, certainty, compliance, formality, french, ocean, sentiment"):
        sl.shipped("cats")
    with pytest.raises(ValueError, match="there are instructions, neutral, prompts"):
        sl.shipped_texts("ocean")
    with pytest.raises(ValueError, match="it is one of dev, held_out"):
        sl.shipped("ocean", split="test")


def test_the_licence_and_every_set_stand_in_the_readme():
    readme = (Path(sl.__file__).parent / "data" / "README.md").read_text()
    assert "MIT" in readme
    for name in (*SETS, *(f"texts/{name}" for name in TEXTS)):
        assert f"`{name}`" in readme
