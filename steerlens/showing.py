"""Texts of several controllers side by side, each token coloured by what the controller did at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller
from steerlens.core.progress import bar
from steerlens.core.tensorfile import write_whole
from steerlens.evaluate.texts import prompt_ids
from steerlens.fit.contrast import Text
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.pages.markup import fragment, legend, number, page, text, wash
from steerlens.steering import Run, steer

UNSTEERED = "unsteered"
#: Units of signals that have one.
UNITS = {
    "error": "activation units",
    "u_norm": "activation units",
    "feature": "activation units of the autoencoder",
    "gate": "0 closed, 1 open",
    "angle_rad": "rad",
}


@dataclass(frozen=True)
class Piece:
    """A few characters and what the controller did at their token; `value` is NaN where it did nothing."""

    text: str
    prompt: bool
    value: float
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """Texts with a signal of each of their tokens; a notebook shows it as a page of cards.

    Attributes:
        prompts: As text.
        texts: Continuations, by name of the controller, in the order of the prompts; `"unsteered"` first.
        signal: What colours the tokens.
        values: The signal of each token, by name, one `[pos]` for each prompt: of `u_norm` the root of the summed
            squares over the sites where it was recorded, of others the mean. At tokens that were not steered `u_norm`
            is 0 and any other signal NaN. The last token of a text was never read by the
            model and has none.
        pieces: What is drawn, by name, for each prompt.
    """

    prompts: tuple[str, ...]
    texts: Mapping[str, list[str]]
    signal: str
    values: Mapping[str, list[Tensor]]
    pieces: Mapping[str, list[list[Piece]]]

    def save(self, path: str | Path) -> None:
        """Write a page of HTML that needs nothing from outside: dark or light as the reader's system is.

        Raises:
            OSError: it cannot be written there.
        """
        write_whole(path, [page("Steered texts", self._repr_html_()).encode("utf-8")])

    def _repr_html_(self) -> str:
        known = [float(v) for rows in self.values.values() for row in rows for v in row[row.isfinite()]]
        least, most = min([0.0, *known]), max([0.0, *known])
        scale = legend(self.signal, UNITS.get(self.signal, ""), least, most) if known else ""
        sections = []
        for index, prompt in enumerate(self.prompts):
            cards = "".join(
                f'<div class="sl-card"><b>{text(name)}</b><div class="sl-text">'
                f"{''.join(_span(piece, max(-least, most)) for piece in rows[index])}</div></div>"
                for name, rows in self.pieces.items()
            )
            sections.append(f'<h3>{text(prompt)}</h3><div class="sl-cards">{cards}</div>')
        return fragment(scale, *sections)

    def __repr__(self) -> str:
        names = list(self.texts)
        lines = [f"Shown({len(self.prompts)} prompts, coloured by {self.signal!r})"]
        for index, prompt in enumerate(self.prompts):
            lines.append(prompt)
            lines += [f"  {name:{max(map(len, names))}}  {self.texts[name][index]!r}" for name in names]
        return "\n".join(lines)


def show(
    model: Model,
    prompts: Text | Sequence[Text],
    controllers: Controller | Mapping[str, Controller],
    *,
    signal: str = "u_norm",
    strength: float = 1.0,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    prepend_bos: bool | None = None,
    trust: bool = False,
    progress: bool = True,
) -> Shown:
    """What a model writes, unsteered and with each controller, every token coloured by a signal:

        sl.show(model, ["I think that"], {"lqr": a, "caa": b}, signal="u_norm")
        sl.show(model, prompts, controller).save("texts.html")

    A token's colour is the signal while the model read that token, on one scale for all texts: over the sites where a
    controller reports it, the root of the summed squares of `u_norm`, so that controllers of one and of many layers
    compare, and the mean of others. A tap or the mouse shows the value, and the layer where it is largest.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model.
        prompts: Strings, chat messages or token ids; a single string is one prompt.
        controllers: By the name that they get on the page; or one alone, which is named after its method.
        signal: `"u_norm"`, `"error"`, `"gate"`, `"feature"` or any other scalar that a loop reports. A controller
            without it is shown uncoloured, if another one has it.
        strength: Factor on every control.
        max_new_tokens: Largest number of tokens to write.
        temperature: 0 is greedy.
        seed: Of the sampling.
        prepend_bos: As in `Pairs`.
        trust: As in `steer`.
        progress: Show a bar.

    Raises:
        TypeError: no prompts or no controllers, but something else.
        ValueError: a signal that no controller reports, the message lists those that there are; a name twice.
    """
    host = host_of(model)
    chosen = _named(controllers)
    given = _prompts(prompts)
    _check_signal(signal, chosen)
    ids = [prompt_ids(prompt, host, prepend_bos) for prompt in given]
    decode = _decoder(host)
    pieces: dict[str, list[list[Piece]]] = {name: [] for name in (UNSTEERED, *chosen)}
    values: dict[str, list[Tensor]] = {name: [] for name in pieces}
    texts: dict[str, list[str]] = {name: [] for name in pieces}
    work = [(name, index) for name in pieces for index in range(len(ids))]
    for name, index in bar(work, desc="writing", progress=progress):
        own, row = chosen.get(name), ids[index]
        # the libraries sample with the global generator; it is put back
        cuda = [host.device] if host.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed * 1_000_003 + index)
            tokens, sites = _write(host, own, row, signal, strength, trust, max_new_tokens, temperature)
        end = getattr(host.tokenizer, "eos_token_id", None)
        if end in tokens[len(row) :]:
            tokens = tokens[: tokens.index(end, len(row)) + 1]
        value, notes = _pooled(sites, len(tokens), signal)
        values[name].append(value)
        pieces[name].append(_pieces(tokens, len(row), value, notes, signal, decode))
        texts[name].append(decode(tokens[len(row) :]))
    return Shown(tuple(decode(row) for row in ids), texts, signal, values, pieces)


def _write(
    host: Host,
    controller: Controller | None,
    row: list[int],
    signal: str,
    strength: float,
    trust: bool,
    count: int,
    temperature: float,
) -> tuple[list[int], dict[str, Tensor]]:
    """Tokens of prompt and continuation, and the signal at each site, `{site: [pos]}`."""
    rows = torch.tensor([row])
    if controller is None:
        return host.sample(rows, count, temperature=temperature)[0].tolist(), {}
    reported = signal in _signals(controller)
    record = "scalars" if reported else None
    with steer(host, controller, strength=strength, record=record, trust=trust) as run:
        tokens = host.sample(rows, count, temperature=temperature)[0].tolist()
    return tokens, _at_sites(run, signal) if reported else {}


def _at_sites(run: Run, signal: str) -> dict[str, Tensor]:
    """The signal of the run's only row, by hook name; a total where loops of one site have one."""
    found: dict[str, Tensor] = {}
    for names in run.signals.values():
        full = [names.total[signal]] if signal in names.total else [own[signal] for own in names.own if signal in own]
        found |= {name: run.record[name][0].double().cpu() for name in full if name in run.record}
    return found


def _pooled(sites: Mapping[str, Tensor], length: int, signal: str) -> tuple[Tensor, list[str]]:
    """The signal over all sites at each token, `[pos]`, and which site has the largest value there, in words."""
    empty = torch.full((length,), torch.nan, dtype=torch.float64)
    if not sites:
        return empty, [""] * length
    layers = [name.partition(".hook_")[0].removeprefix("blocks.") for name in sites]
    padded = [torch.cat([value, empty])[:length] for value in sites.values()]
    stacked = torch.stack(padded)
    known = stacked.isfinite()
    total = stacked.square().nansum(0).sqrt() if signal == "u_norm" else stacked.nanmean(0)
    notes = []
    for column, there in zip(stacked.T, known.T, strict=True):
        most = int(column.abs().nan_to_num(-1.0).argmax())
        several = len(layers) > 1 and bool(there.any())
        notes.append(f"; largest at layer {layers[most]}: {number(float(column[most]))}" if several else "")
    return torch.where(known.any(0), total, torch.nan), notes


def _pieces(tokens: list[int], prompt: int, value: Tensor, notes: list[str], signal: str, decode: Any) -> list[Piece]:
    """Characters of each token; tokens that are a part of one character only are put together."""
    found: list[Piece] = []
    start, done = 0, ""
    for index in range(len(tokens)):
        whole = decode(tokens[: index + 1])
        seam = index + 1 in (prompt, len(tokens))
        if not seam and (whole.endswith("\ufffd") or not whole.startswith(done)):
            continue
        own = value[start : index + 1]
        mean = float(own.nanmean())
        note = f"{signal} {number(mean)}{notes[index]}" if mean == mean else ""
        words = whole[len(done) :] if whole.startswith(done) else decode(tokens[start : index + 1])
        found.append(Piece(words, index < prompt, mean, note))
        start, done = index + 1, whole
    return [piece for piece in found if piece.text]


def _span(piece: Piece, most: float) -> str:
    words = text(piece.text)
    if piece.note:
        title = text(f"{piece.text.strip()!r}: {piece.note}")
        words = f'<span tabindex="0" title="{title}" style="background:{wash(piece.value, most)}">{words}</span>'
    return f"<i>{words}</i>" if piece.prompt else words


def _decoder(host: Host) -> Any:
    if host.tokenizer is None:
        return lambda tokens: " ".join(map(str, tokens)) + " " * bool(tokens)
    return lambda tokens: host.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _named(controllers: Any) -> dict[str, Controller]:
    if isinstance(controllers, Controller):
        controllers = {str(controllers.recipe.get("method", "steered")): controllers}
    if not isinstance(controllers, Mapping) or not all(isinstance(own, Controller) for own in controllers.values()):
        raise TypeError(f'show() takes controllers by name, {{"lqr": controller}}; it got {controllers!r:.80}')
    if not controllers:
        raise ValueError("no controllers; give at least one")
    if UNSTEERED in controllers:
        raise ValueError("a controller is named 'unsteered', which is the name of the texts without one; rename it")
    return {str(name): own for name, own in controllers.items()}


def _prompts(prompts: Any) -> list[Any]:
    """A list of prompts; a string, a chat or token ids alone are one."""
    if isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], (dict, int))):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise TypeError(f"show() takes a list of prompts; it got {prompts!r:.80}")
    return list(prompts)


def _signals(controller: Controller) -> set[str]:
    vectors = {name for loop in controller for name in loop.law.vectors}
    return {"u_norm", *(name for loop in controller for name in loop.signals if name not in vectors)}


def _check_signal(signal: str, controllers: Mapping[str, Controller]) -> None:
    known = {name: _signals(own) for name, own in controllers.items()}
    if not any(signal in own for own in known.values()):
        words = "; ".join(f"{name}: {', '.join(sorted(own))}" for name, own in known.items())
        raise ValueError(f"no controller reports {signal!r}; there are, by controller, {words}")
