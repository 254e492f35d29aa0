"""Contrast data: texts of wanted and of unwanted behaviour, and where in each text to read the activation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from steerlens.fit.pairs_file import read_texts
from steerlens.hosts import Host

#: A string, (prompt, completion) as strings or as token ids, chat messages with role and content, or token ids.
Text: TypeAlias = str | tuple[str, str] | tuple[list[int], list[int]] | list[dict[str, str]] | list[int] | Tensor

#: Which activation of a text is taken, see `Pairs`.
Read: TypeAlias = Literal["last", "mean", "completion"] | int

READINGS: tuple[str, ...] = get_args(get_args(Read)[0])


class Reading:
    """Token ids of texts and, for each, the weights with which its tokens are pooled."""

    def __init__(self, tokens: list[list[int]], weights: list[list[float]]):
        self.tokens = tokens
        self.weights = weights


class Pairs:
    """Texts that show the wanted behaviour and texts that do not.

    Args:
        positive: Texts with the behaviour. Each is a string, a `(prompt, completion)` tuple, a list of chat messages
            (`{"role": ..., "content": ...}`, put through the tokenizer's chat template), or token ids. Prompt and
            completion are two strings or two lists of token ids.
        negative: Texts without it; as many as positives if a method needs pairs.
        read: Which activation of a text to take: `"last"` (its last token), `"mean"` (the mean over its tokens, the
            first excluded, which carries an attention sink), `"completion"` (the mean over the completion's tokens), or
            an index into the text's tokens, negative from its end.
        prepend_bos: Whether strings and tuples start with the BOS token; default: as the model's library does with a
            string, so that texts are read as they will be steered (TransformerLens: `cfg.default_prepend_bos`;
            nnsight: what the tokenizer does). Chat templates bring their own, token ids are taken as they are.
        generation_prompt: Whether messages that do not end with the assistant's are read with the beginning of its
            answer after them, as the chat template writes it (`add_generation_prompt`): their last token then is the
            one after which an answer is generated.

    Raises:
        TypeError: a side is a single string, or a text is of another kind.
        ValueError: a side is empty, a text is empty, or `read="completion"` without completions.
    """

    def __init__(
        self,
        positive: Sequence[Text],
        negative: Sequence[Text],
        *,
        read: Read = "last",
        prepend_bos: bool | None = None,
        generation_prompt: bool = True,
    ):
        for side, given in (("positive", positive), ("negative", negative)):
            if isinstance(given, (str, bytes)):
                raise TypeError(f"{side} is a single string; give a list of texts: [{_short(given)}]")
        self.positive, self.negative = list(positive), list(negative)
        self.read = read
        self.prepend_bos = prepend_bos
        self.generation_prompt = generation_prompt
        for side, texts in (("positive", self.positive), ("negative", self.negative)):
            if not texts:
                raise ValueError(f"no {side} texts; contrast needs at least one on each side")
            for index, text in enumerate(texts):
                _check_text(text, f"{side} text {index}", read)
        if not isinstance(read, int) and read not in READINGS:
            raise ValueError(f"read={read!r}; it is one of {', '.join(READINGS)} or an index into a text's tokens")

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        positive: str | None = None,
        negative: str | None = None,
        prompt: str | None = None,
        read: Read | None = None,
        prepend_bos: bool | None = None,
    ) -> Pairs:
        """Pairs from a table in a file: csv (with commas, semicolons or tabs), or JSON lines, one pair a row.

        The first line of a csv names the columns. Known names, case ignored: `positive`, `pos`, `chosen`, `wanted`,
        `good`, `with`, `yes` and `negative`, `neg`, `rejected`, `unwanted`, `bad`, `without`, `no`; a prompt that both
        texts complete is `prompt`, `question`, `instruction` or `input`, and a completion that does not begin with a
        space gets one where the prompt does not end with one. Instead of pairs, a row may hold one `text` (`sentence`,
        `completion`) and its `label` (`side`, `class`): positive or negative, 1 or 0, true or false. In JSON, a text
        may also be a list of chat messages. Rows without any text are left out.

        Args:
            path: The file, UTF-8.
            positive, negative, prompt: Names of the columns, if they are others.
            read: As in `Pairs`; default: `"completion"` if there are prompts, else `"mean"`.
            prepend_bos: As in `Pairs`.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is no such table; the message names the line, or the columns that there are.
        """
        sides = read_texts(path, positive=positive, negative=negative, prompt=prompt)
        completed = all(isinstance(text, tuple) for side in sides for text in side)
        by_default: Read = "completion" if completed else "mean"
        return cls(*sides, read=by_default if read is None else read, prepend_bos=prepend_bos)

    def __len__(self) -> int:
        return min(len(self.positive), len(self.negative))

    def __getitem__(self, rows: slice) -> Pairs:
        options: dict[str, Any] = {name: getattr(self, name) for name in ("read", "prepend_bos", "generation_prompt")}
        return Pairs(self.positive[rows], self.negative[rows], **options)

    def __repr__(self) -> str:
        return f"Pairs({len(self.positive)} positive, {len(self.negative)} negative, read={self.read!r})"

    def sides(self, host: Host) -> tuple[Reading, Reading]:
        """Positive and negative texts as tokens of a model, and pooling weights."""
        return self._reading(self.positive, host), self._reading(self.negative, host)

    def _reading(self, texts: Sequence[Text], host: Host) -> Reading:
        tokens, weights = [], []
        for index, text in enumerate(texts):
            split, prompted = self.read == "completion", self.generation_prompt
            ids, prompt = tokenize(text, host, self.prepend_bos, split=split, generation_prompt=prompted)
            if not ids:
                raise ValueError(f"text {index} ({text!r}) has no tokens")
            tokens.append(ids)
            weights.append(_weights(len(ids), prompt, self.read, f"text {index} ({_short(text)})"))
        return Reading(tokens, weights)

    def digest(self) -> str:
        """A hash of the texts and of how they are read, for a controller's recipe."""
        held = [_plain(self.positive), _plain(self.negative), self.read, self.prepend_bos]
        plain = json.dumps(held + [False] * (not self.generation_prompt), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]


def tokenize(
    text: Text, host: Host, prepend_bos: bool | None = None, *, split: bool = False, generation_prompt: bool = True
) -> tuple[list[int], int]:
    """Token ids of one text, and how many of them belong to its prompt (all, if there is no completion).

    Args:
        generation_prompt: Messages that do not end with the assistant's are followed by the beginning of its answer, as
            they are when an answer is generated.

    Raises:
        ValueError: with `split`, a chat whose template writes the messages before the answer differently once the
            answer is there, so that it is not known which token begins the answer.
    """
    tokenizer = host.tokenizer
    if isinstance(text, str):
        ids = _encode(text, host, prepend_bos)
        return ids, len(ids)
    if isinstance(text, tuple):
        prompt, completion = text
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return [int(token) for token in [*prompt, *completion]], len(prompt)
        head = _encode(prompt, host, prepend_bos)
        whole = _encode(prompt + completion, host, prepend_bos)
        return whole, _common(head, whole)
    if isinstance(text, Tensor) or _is_id(text[0]):
        ids = [int(token) for token in cast(list[int], text)]
        pad = getattr(tokenizer, "pad_token_id", None)
        if len(ids) > 1 and pad is not None and (ids[-1] == ids[-2] == pad or ids[0] == ids[1] == pad):
            raise ValueError(f"token ids {ids[:4]}...{ids[-4:]} carry padding ({pad}); give each text without its pads")
        return ids, len(ids)
    template = _need(tokenizer).apply_chat_template
    text = cast(list[dict[str, str]], text)
    answered = text[-1]["role"] == "assistant"
    begun = generation_prompt and not answered
    ids = template(text, tokenize=True, add_generation_prompt=begun, return_dict=True)["input_ids"]
    if not answered:
        return ids, len(ids)
    if split:
        head, whole = (
            template(messages, tokenize=False, add_generation_prompt=asked)
            for messages, asked in ((text[:-1], True), (text, False))
        )
        if not whole.startswith(head):
            raise ValueError(
                f"the chat template does not begin {_short(text)} with what it gives without the answer; give "
                "(prompt, completion) tuples"
            )
    head = template(text[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids, _common(head, ids)


def _common(head: list[int], whole: list[int]) -> int:
    """Length of the common prefix: a tokenizer may merge across the seam of prompt and completion."""
    length = 0
    while length < min(len(head), len(whole)) and head[length] == whole[length]:
        length += 1
    return length


def _weights(length: int, prompt: int, where: Read, what: str) -> list[float]:
    if isinstance(where, int):
        position = where if where >= 0 else length + where
        if not 0 <= position < length:
            raise ValueError(f"read={where} lies outside {what}, which has {length} tokens")
        chosen = range(position, position + 1)
    elif where == "last":
        chosen = range(length - 1, length)
    elif where == "mean":
        chosen = range(min(1, length - 1), length)
    else:
        chosen = range(prompt, length)
        if not chosen:
            raise ValueError(f"{what} has no completion tokens to read")
    return [1.0 / len(chosen) if position in chosen else 0.0 for position in range(length)]


def _check_text(text: Text, what: str, where: Read) -> None:
    if isinstance(text, str):
        empty = not text
    elif isinstance(text, tuple):
        strings = all(isinstance(part, str) for part in text)
        ids = all(isinstance(part, list) and all(map(_is_id, part)) for part in text)
        if len(text) != 2 or not (strings or ids):
            raise ValueError(f"{what} is {text!r}; a tuple is (prompt, completion), two strings or two lists of ids")
        empty = not text[0] and not text[1]
    elif isinstance(text, Tensor):
        if text.ndim != 1:
            raise ValueError(f"{what} is a tensor of shape {tuple(text.shape)}; give token ids of one text, [pos]")
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise ValueError(f"{what} is a tensor of {text.dtype}; token ids are whole numbers")
        empty = text.numel() == 0
    elif isinstance(text, list):
        empty = not text
        messages = all(isinstance(entry, dict) and "role" in entry for entry in text)
        if not (messages or all(map(_is_id, text))):
            raise ValueError(f"{what} is {text!r}; a list holds token ids or chat messages with role and content")
    else:
        raise TypeError(
            f"{what} is a {type(text).__name__}; give a string, (prompt, completion), messages or token ids"
        )
    if empty:
        raise ValueError(f"{what} is empty")
    if (
        where == "completion"
        and not isinstance(text, tuple)
        and not (isinstance(text, list) and isinstance(text[0], dict))
    ):
        raise ValueError(
            f"{what} has no completion; read='completion' needs (prompt, completion) tuples or chat messages"
        )


def _is_id(token: Any) -> bool:
    """Whether it is a whole number, numpy's included."""
    return hasattr(token, "__index__") and not isinstance(token, (bool, Tensor))


def _encode(text: str, host: Host, prepend_bos: bool | None) -> list[int]:
    tokenizer = _need(host.tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not (host.prepends_bos if prepend_bos is None else prepend_bos):
        return ids
    if tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token")
    return [tokenizer.bos_token_id, *ids]


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give texts as token ids")
    return tokenizer


def _plain(texts: Sequence[Text]) -> Any:
    return [text.tolist() if isinstance(text, torch.Tensor) else text for text in texts]


def _short(text: Text) -> str:
    words = repr(text)
    return words if len(words) <= 60 else words[:57] + "..."
