"""What a pass knows beyond its own tokens: summaries of the prompt, decisions about it, references, tangents."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any

import torch
from torch import Tensor

from steerlens.core.law import Loop
from steerlens.core.positions import PROMPT_ONLY, Positions
from steerlens.core.prompt import Direction, Summary
from steerlens.core.sequence import Sequence
from steerlens.core.sites import Site


class Companion:
    """Abstract: runs the model beside a steered forward pass, on the same tokens and unsteered. A host makes it."""

    def note(self) -> None:
        """Keep the tokens of the pass that begins, for a prompt that a later one completes; nothing by default."""

    def states(self, sites: Ordered[Site], *, goes_on: bool) -> dict[Site, Tensor]:
        """The unsteered states of the pass that begins, or of its whole sequence so far, `[batch pos ...]` each.

        Args:
            goes_on: Later passes of the sequence will be asked for, too: keep what they need.
        """
        raise NotImplementedError

    def tangents(self, sites: Ordered[Site], direction: Direction, *, goes_on: bool) -> dict[Site, Tensor]:
        """How these states change along a direction of the parameters, `[batch pos ...]` each.

        Args:
            goes_on: Later passes of the sequence will be asked for, too: keep what they need.
        """
        raise NotImplementedError


class Aside:
    """Summaries, decisions, references, tangents of one sequence; a companion computes those that the pass lacks.

    Args:
        loops: Of the pass.
    """

    def __init__(self, loops: Ordered[Loop]):
        self._asked = [summary for loop in loops for summary in loop.summaries]
        # a loop that leaves the prompt alone does not change what is known of it
        first = min((loop.act for loop in loops if not _after_prompt(loop)), default=None)
        # what is before the first control is unsteered by itself
        self._clean = [summary for summary in self._asked if first is not None and first < summary.site]
        self._own = [summary for summary in self._asked if summary not in self._clean]
        # of these, what is asked for before it is seen, if one pass holds the prompt and what is generated
        earliest = min((loop.act for loop in loops), default=None)
        self._late = [summary for summary in self._own if earliest is not None and earliest < summary.site]
        #: Sites that the pass must show to `see`.
        self.summarised = {summary.site for summary in self._own}
        self._directions: list[Direction] = []
        self._bent: list[list[Loop]] = []  # by direction
        self._along: list[int | None] = []  # by loop
        self._referring = [loop for loop in loops if loop.reference is not None]
        for loop in loops:
            self._along.append(None if loop.tangent is None else self._index(loop.tangent))
            if loop.tangent is not None:
                self._bent[self._index(loop.tangent)].append(loop)
        #: Of the present pass.
        self.sequence = Sequence()

    @property
    def apart(self) -> list[Site]:
        """Sites whose unsteered states or tangents a companion may be asked for; without any, none is needed."""
        bent = {loop.act for loops in self._bent for loop in loops}
        referred = {loop.reference for loop in self._referring if loop.reference is not None}
        return sorted({*bent, *referred, *(summary.site for summary in self._asked)})

    @property
    def accompanied(self) -> bool:
        """Whether a companion runs beside the passes after the first, too."""
        return bool(self._directions or self._referring)

    def begin(
        self,
        sequence: Sequence,
        companion: Callable[[Any], Companion] | None,
        alone: bool,
        *,
        observed: bool = True,
    ) -> None:
        """Enter a forward pass.

        Args:
            sequence: The one that it belongs to.
            companion: As in `Pass.begin`.
            alone: No other run steers it.
            observed: Somebody may look at signals, also at those of loops whose strength is 0.
        """
        self.sequence = sequence
        if not (self._asked or self._directions or self._referring):
            return
        positions, beside = sequence.positions, None if companion is None else companion(sequence.kept)
        sequence.tangents, sequence.references = {}, {}
        clean = self._clean if alone else self._asked
        if alone and positions.past < positions.end and positions.start < positions.seen:
            clean = [*clean, *self._late]
        if clean and beside is not None:
            beside.note()
        missing = [summary for summary in clean if id(summary) not in sequence.pooled]
        missing = missing if positions.past < positions.end else []
        referring = [loop for loop in self._referring if observed or loop.factor]
        goes_on = _continues(referring, positions)
        referring = referring if goes_on or _selected(referring, positions) else []
        if missing or referring:
            self._read_apart(_required(beside), missing, referring, goes_on=goes_on or not positions.complete)
        for index, (direction, loops) in enumerate(zip(self._directions, self._bent, strict=True)):
            goes_on = _continues(loops, positions)
            if goes_on or _selected(loops, positions):
                sites = sorted({loop.act for loop in loops})
                found = _required(beside).tangents(sites, direction, goes_on=goes_on)
                sequence.tangents.update({(index, site): value for site, value in found.items()})

    def _read_apart(
        self, beside: Companion, summaries: list[Summary], referring: Ordered[Loop], *, goes_on: bool
    ) -> None:
        """Have the unsteered states of this pass: references, and summaries, pooled once the prompt is complete."""
        sequence, positions = self.sequence, self.sequence.positions
        pooled = {summary.site for summary in summaries}
        referred = {loop.reference for loop in referring if loop.reference is not None}
        found = beside.states(sorted(pooled | referred), goes_on=goes_on)
        for site in sorted(pooled | referred):
            if site not in found:
                raise RuntimeError(f"a loop needs the state at '{site}', and this pass ends before it")
        sequence.references = {site: found[site][:, -positions.length :] for site in referred}
        for site in pooled:
            before = sequence.states.setdefault((site, "apart"), [])
            if found[site].shape[1] == positions.seen:
                before.clear()
            before.append(found[site])
        if not positions.complete:
            return
        whole = positions.whole()
        for summary in summaries:
            pieces = sequence.states[summary.site, "apart"]
            x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            sequence.pooled[id(summary)] = summary.of(x, whole.select(summary.where))
        for site in pooled:
            del sequence.states[site, "apart"]

    def _index(self, direction: Direction) -> int:
        """Number of a direction; loops of a loaded controller share its tensors, not the object."""
        for index, known in enumerate(self._directions):
            if known.values[0] is direction.values[0]:
                return index
        self._directions.append(direction)
        self._bent.append([])
        return len(self._directions) - 1

    def see(self, site: Site, x: Tensor) -> None:
        """Take a state of the pass itself, before any control has reached it."""
        pieces = self.sequence.states.setdefault(site, [])
        pieces.append(x.detach())
        pooled, positions = self.sequence.pooled, self.sequence.positions
        if not positions.complete:
            return
        for summary in self._own:
            wanted = summary.site == site and id(summary) not in pooled
            if wanted and sum(piece.shape[1] for piece in pieces) == positions.seen:
                state = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
                pooled[id(summary)] = summary.of(state, positions.whole().select(summary.where))

    def summary(self, summary: Summary) -> Tensor:
        """A summary of the prompt of this sequence, `[batch ...]`.

        Raises:
            RuntimeError: parts of the prompt are still to come, or went through the model before it was steered.
        """
        held = self.sequence.pooled.get(id(summary))
        if held is None:
            positions = self.sequence.positions
            if not positions.complete:
                raise RuntimeError(
                    f"a loop needs the whole prompt at its tokens, but {positions.end - positions.seen} of them are "
                    "still to come: leave prefill_chunk_size out, or act at where='last' or where='generated'"
                )
            raise RuntimeError(
                "a loop needs the unsteered state of the whole prompt, but a part of it went through the model before; "
                "begin with an empty KV cache"
            )
        return held

    def tangent(self, loop: int, site: Site) -> Tensor:
        """The tangent of this pass's states at a site, along the direction of the loop of this number."""
        return self.sequence.tangents[self._along[loop], site]


def _continues(loops: Ordered[Loop], positions: Positions) -> bool:
    """Whether any of some loops acts in later passes of the sequence."""
    later = any(not (isinstance(loop.where, str) and loop.where in PROMPT_ONLY) for loop in loops)
    return bool(loops) and (later or not positions.complete)


def _selected(loops: Ordered[Loop], positions: Positions) -> bool:
    """Whether any of some loops acts in this pass."""
    return any(positions.select(loop.where) is not None for loop in loops)


def _after_prompt(loop: Loop) -> bool:
    return isinstance(loop.where, str) and loop.where == "generated"


def _required(companion: Companion | None) -> Companion:
    if companion is None:
        raise RuntimeError(
            "a loop needs a second forward pass in addition to the steered one, which cannot be run here: a server "
            "runs it for trusted requests only. Levels counted from origin='zero' or 'negative' need none"
        )
    return companion
