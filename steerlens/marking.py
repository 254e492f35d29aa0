"""`where` by the text: after a marker, until one, between two, in the assistant's turns of a chat."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from steerlens.core.span import Span
from steerlens.hosts import host_of
from steerlens.hosts.types import Model


def after(model: Model, marker: str, *, inclusive: bool = True) -> Span:
    """The tokens that come after a marker, for `where=`:

        steer(model, controller, where=after(model, "</think>"))

    The marker is looked for in the whole text of a row, prompt and generation, character by character, so that it is
    found however it was split into tokens and whatever shares a token with it. As with `"last"`, the token that
    completes the marker is the first that is steered, since it is the one that writes what follows.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model; its tokenizer is asked for the text of each token.
        marker: Text, upper and lower case and spaces as they are; the first occurrence counts. Special tokens are text.
        inclusive: Whether the token that completes the marker is one of them.

    Returns:
        What `where` takes, for this model's tokenizer; it is saved with a controller and sent to a server.

    Raises:
        ValueError: an empty marker, one that no tokens of the model spell, or a model without a tokenizer.
    """
    found = _Automaton(f"after({marker!r}{_without(inclusive)})", inclusive)
    return found.span(_texts(model, marker), begin=marker, end=None)


def until(model: Model, marker: str) -> Span:
    """The tokens that come before a marker is complete, for `where=`; all, as long as there is none.

    The tokens that begin a marker of several tokens are among them: what they will become is not known when they are
    read. The one that completes it is not.

    Args:
        model, marker: As for `after`.

    Raises:
        ValueError: as `after`.
    """
    found = _Automaton(f"until({marker!r})", True)
    return found.span(_texts(model, marker), begin=None, end=marker)


def between(model: Model, start: str, end: str, *, inclusive: bool = True) -> Span:
    """The tokens between two markers, as often as they occur, for `where=`.

    From the token that completes `start`, see `after`, to the one before the token that completes `end`. A `start`
    within counts for nothing, and markers do not overlap: `end` begins behind `start`.

    Args:
        model: As for `after`.
        start, end: Markers, as for `after`; they may be equal.
        inclusive: Whether the token that completes `start` is one of them.

    Raises:
        ValueError: as `after`.
    """
    found = _Automaton(f"between({start!r}, {end!r}{_without(inclusive)})", inclusive)
    return found.span(_texts(model, start, end), begin=start, end=end)


def assistant(model: Model, *, inclusive: bool = True) -> Span:
    """The assistant's turns of a chat, for `where=`: `between` what the chat template writes before and after them.

    Args:
        model: As for `after`; its tokenizer has a chat template.
        inclusive: Whether the last token before a turn is one of them; it writes the turn's first.

    Raises:
        ValueError: no chat template, or one in which the turns cannot be told apart.
    """
    tokenizer = _tokenizer(model)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("assistant() needs a chat template, and the model's tokenizer has none; use between()")
    start, end = _turn(tokenizer)
    found = _Automaton(f"assistant({_without(inclusive)[2:]})", inclusive)
    return found.span(_texts(model, start, end), begin=start, end=end)


def _without(inclusive: bool) -> str:
    return "" if inclusive else ", inclusive=False"


def _tokenizer(model: Model) -> Any:
    tokenizer = host_of(model).tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so that nothing knows what its tokens spell")
    return tokenizer


# -- what tokens spell ------------------------------------------------------------------------------------------


def _texts(model: Model, *markers: str) -> list[bytes]:
    """The bytes that each token adds to a text, by id; checks that the markers can be written."""
    spelled = spelling(_tokenizer(model))
    for marker in markers:
        if not isinstance(marker, str) or not marker:
            raise ValueError(f"marker={marker!r}; give a text of at least one character")
        if not _writable(_Automaton("", True).span(spelled, begin=marker, end=None)):
            raise ValueError(f"no tokens of the model spell the marker {marker!r}, so that it can never occur")
    return spelled


def _writable(found: Span) -> bool:
    """Whether some tokens lead into a span."""
    reached, before = torch.zeros(len(found.default), dtype=torch.bool), -1
    reached[0] = True
    while int(reached.sum()) > before:
        before = int(reached.sum())
        reached[found.table[:, reached].flatten().long()] = True
        reached[found.default[reached].long()] = True
    return bool((reached & found.inside).any())


def spelling(tokenizer: Any) -> list[bytes]:
    """The bytes that each token adds to a text behind another token, by id."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode([anchor], **options)
    texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], **options)
    alone = {"\N{REPLACEMENT CHARACTER}"}
    found = []
    for token, text in enumerate(texts):
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode([token], **options)
        found.append(_raw(tokenizer, token) if alone & {*piece} else piece.encode())
    return found


def _raw(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token that is no whole number of characters, as vocabularies of bytes write them."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    if single:
        return bytes([int(single[1], 16)])
    if all(letter in _BYTES for letter in name):
        return bytes(_BYTES[letter] for letter in name)
    return str(tokenizer.decode([token])).encode()


def _letters() -> dict[str, int]:
    """The characters that stand for bytes in the vocabularies of byte-level tokenizers, as GPT-2's."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _letters()


def _turn(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes before and after an assistant's turn."""
    asked, answered, again = "Zqa", "Zqb", "Zqc"
    turns = [("user", asked), ("assistant", answered), ("user", again)]
    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        begun = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        ended = tokenizer.apply_chat_template(chat[:1], tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template refuses a chat of plain texts ({error}); use between()") from error
    places = [whole.find(content) for _, content in turns]
    if min(places) < 0 or places != sorted(places):
        raise ValueError("the chat template does not write the turns one after the other; use between()")
    header = whole[places[0] + len(asked) : places[1]]
    # an answer that is asked for may have less before it than one that is there: no space, or no empty thoughts
    wanted = begun[begun.find(asked) + len(asked) :]
    equal = [one == other for one, other in zip(header, wanted, strict=False)]
    start = header[: [*equal, False].index(False)]
    start = start if start.strip() else header
    # what ends the user's turn is not of the answer
    own = start.removeprefix(ended[ended.find(asked) + len(asked) :])
    start = own if own.strip() else start
    footer = whole[places[1] + len(answered) : places[2]]
    special = [text for text in getattr(tokenizer, "all_special_tokens", []) if text in footer]
    special += [str(added) for added in getattr(tokenizer, "added_tokens_decoder", {}).values() if str(added) in footer]
    end = min(special, key=lambda text: (footer.index(text), -len(text))) if special else footer
    if not start or not end:
        raise ValueError("the chat template writes nothing before or after the assistant's turns; use between()")
    return start, end


# -- the automaton ----------------------------------------------------------------------------------------------


class _Automaton:
    """Builds what a `Span` walks through: states of a search byte by byte, joined to steps token by token.

    Args:
        words: Of the span.
        inclusive: Whether the token that completes the first marker is inside.
    """

    def __init__(self, words: str, inclusive: bool):
        self.words = words
        self.inclusive = inclusive
        #: By state: the next one for each byte, whether it is inside, and the state that it is when a token begins.
        self.next: list[list[int]] = []
        self.inside: list[bool] = []
        self.settled: list[int] = []

    def span(self, spelled: list[bytes], *, begin: str | None, end: str | None) -> Span:
        """The span: after `begin` if there is one, until `end` if there is one; `spelled` by token."""
        first = None if begin is None else self._search(begin.encode(), inside=False)
        within = self._hold(True) if end is None else self._search(end.encode(), inside=True)
        entered = within
        if first is not None and not self.inclusive:
            # the same states again, for what is left of the token that has completed the marker
            entered = self._hold(False) if end is None else self._search(str(end).encode(), inside=False)
            for state in range(len(self.next) - entered):
                self.settled[entered + state] = within + state
        if first is not None:
            self._lead(first, within, entered)
        back = first if first is not None else None if end is None else self._hold(False)
        if end is not None and back is not None:
            self._lead(within, len(self.next), back)
        return self._joined(spelled)

    def _hold(self, inside: bool) -> int:
        """A state that is never left."""
        state = len(self.next)
        self.next.append([state] * 256)
        self.inside.append(inside)
        self.settled.append(state)
        return state

    def _search(self, marker: bytes, *, inside: bool) -> int:
        """States of the search for a marker, as many as it has bytes; -1 stands for its end. Returns the first."""
        start = len(self.next)
        fallback = start
        for place, byte in enumerate(marker):
            row = list(self.next[fallback]) if place else [start] * 256
            row[byte] = start + place + 1 if place + 1 < len(marker) else -1
            self.next.append(row)
            self.inside.append(inside)
            self.settled.append(start + place)
            if place:
                fallback = self.next[fallback][byte]
        return start

    def _lead(self, low: int, high: int, state: int) -> None:
        """Where the search of the states from `low` on, up to `high`, ends."""
        for row in self.next[low:high]:
            row[:] = [state if found == -1 else found for found in row]

    def _joined(self, spelled: list[bytes]) -> Span:
        """Steps of bytes, joined to those of tokens."""
        step, settled = torch.tensor(self.next), torch.tensor(self.settled)
        order = sorted(range(len(spelled)), key=lambda token: -len(spelled[token]))
        # a column for each token, the longest first, so that those which have a byte left are always in front
        state: Tensor = settled[:, None].repeat(1, len(spelled))
        left = len(order)
        for place in range(len(spelled[order[0]])):
            while len(spelled[order[left - 1]]) <= place:
                left -= 1
            here = torch.tensor([spelled[token][place] for token in order[:left]])
            state[:, :left] = step[state[:, :left], here]
        # a byte that no text has
        default = step[settled, 0xFF]
        table = torch.empty_like(state)
        table[:, torch.tensor(order)] = state
        special = (table != default[:, None]).any(0)
        special[0] = True  # so that there is one
        ids = special.nonzero().flatten()
        kept = table[:, ids].T.to(torch.int16).contiguous()
        return Span(self.words, ids, kept, default.to(torch.int16), torch.tensor(self.inside))
