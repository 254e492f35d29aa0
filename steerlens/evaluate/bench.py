"""A model with the prompts of an evaluation, and the arms that are compared on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Controller, Site
from steerlens.core.progress import bar
from steerlens.evaluate.log import Log, digest
from steerlens.evaluate.scoring import Kept, Reduce, log_probabilities, scored_logits
from steerlens.evaluate.texts import Generation, generate_texts, prompt_ids, with_instruction
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import host_of
from steerlens.hosts.batches import Row, pad_rows
from steerlens.hosts.traced.scored import divergence
from steerlens.hosts.types import Model
from steerlens.steering import apply, steer

#: Log-probabilities of the unsteered model are kept up to this size, and computed again beyond it.
KEPT_BYTES = 2**31
#: Prompts on which the dose is measured.
DOSED = 8


@dataclass(frozen=True)
class Prompt:
    """A baseline that steers by asking: an instruction before every prompt."""

    instruction: str


def prompt(instruction: str) -> Prompt:
    """The prompt baseline: `compare(model, {"caa": c, "prompt": prompt("Answer gladly.")}, ...)`.

    Args:
        instruction: A line before each prompt that is a string, the system message of a chat.

    Raises:
        ValueError: it is empty.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty; give what the model is asked to do")
    return Prompt(instruction)


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Args:
        name: Of its row in a table.
        controller: What steers, or None.
        strength: Factor on every control.
        instruction: Before every prompt.
        seed: Of what the arm itself draws.
    """

    name: str
    controller: Controller | None = None
    strength: float = 1.0
    instruction: str = ""
    seed: int = 0


UNSTEERED = Arm("unsteered", strength=0.0)


class Bench:
    """Runs a model as arms steer it, and keeps what every arm is compared with.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or a host such as `steerlens.remote(model)`.
        prompts: What meters without items of their own are measured on.
        batch: Rows in one forward pass.
        seed: Of all sampling.
        max_new_tokens: Of the texts.
        temperature: Of the texts; 0 is greedy.
        samples: Texts for each prompt.
        prepend_bos: As in `Pairs`.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Text],
        *,
        batch: int = 16,
        seed: int = 0,
        max_new_tokens: int = 24,
        temperature: float = 0.8,
        samples: int = 1,
        prepend_bos: bool | None = None,
    ):
        self.host = host_of(model)
        self.prompts = list(prompts)
        self.batch, self.seed, self.prepend_bos = batch, seed, prepend_bos
        self.max_new_tokens, self.temperature, self.samples = max_new_tokens, temperature, samples
        self._continuations: dict[Any, list[Row]] = {}
        self._together: dict[Any, list[Row]] = {}
        #: Where continuations are kept, so that a run which goes on has those that it began with.
        self.log: Log | None = None
        self._texts: tuple[Any, list[list[Generation]]] | None = None
        self._kept: dict[Any, Tensor] = {}

    def row(self, text: Text, arm: Arm = UNSTEERED) -> Row:
        """A text as prompt and completion. A text without a completion is scored from its second token on."""
        if isinstance(text, str):
            given: Text = (arm.instruction + "\n", text) if arm.instruction else text
        else:
            given = with_instruction(text, arm.instruction, self.host)
        if isinstance(given, tuple) and _is_chat(given[0]):
            given = [*given[0], {"role": "assistant", "content": given[1]}]
        ids, length = tokenize(given, self.host, self.prepend_bos)
        length = 1 if length == len(ids) else max(length, 1)
        if len(ids) <= length:
            raise ValueError(f"{text!r} leaves no token to score; give a longer text or a completion")
        return list(ids[:length]), list(ids[length:])

    def prompt(self, text: Text, arm: Arm = UNSTEERED) -> list[int]:
        """Token ids of a prompt that is to be continued."""
        return prompt_ids(with_instruction(text, arm.instruction, self.host), self.host, self.prepend_bos)

    def logits(self, arm: Arm, rows: Sequence[Row], reduce: Reduce[Kept]) -> list[Kept]:
        """What a function gives for each row's index and scored logits `[completion+1 vocab]`, see `scored_logits`."""
        return scored_logits(
            self.host,
            arm.controller,
            [[*prompt, *completion] for prompt, completion in rows],
            [len(prompt) for prompt, _ in rows],
            strength=arm.strength,
            batch=self.batch,
            reduce=reduce,
        )

    def likelihoods(self, arm: Arm, rows: Sequence[Row]) -> list[Tensor]:
        """Log probability of each token of each completion, `[completion]` each, nats; on a server computed there."""
        if self.host.remote:
            from steerlens.hosts.traced.served import likelihoods

            return likelihoods(self.host, _steering(arm), rows, self.batch)
        return self.logits(arm, rows, lambda index, logits: log_probabilities(logits, rows[index][1]))

    def divergences(self, arm: Arm, rows: Sequence[Row], plain: Sequence[Row]) -> list[list[float]]:
        """KL from the unsteered model at each token of each completion, nats; on a server computed there.

        Args:
            rows: The arm's rows.
            plain: The same completions after the prompts of the unsteered model.
        """
        if arm.controller is None and not arm.instruction:
            return [[0.0] * len(completion) for _, completion in plain]
        if self.host.remote:
            from steerlens.hosts.traced.served import kl_of_rows

            return kl_of_rows(self.host, _steering(arm), rows, plain, self.batch)
        found: dict[int, list[float]] = {}
        longest_first = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
        for start in bar(range(0, len(rows), self.batch), desc="scoring texts"):
            chosen = longest_first[start : start + self.batch]
            own = [plain[index] for index in chosen]
            # strength 0 is compared bit for bit, and bits depend on what else is in a forward pass
            reference = self._levels(own) if arm.strength == 0 else self._reference(own)

            def both(index: int, logits: Tensor, reference: list[Tensor] = reference) -> list[float]:
                return divergence(reference[index].to(logits.device), logits[:-1].log_softmax(-1)).tolist()

            found |= zip(chosen, self.logits(arm, [rows[index] for index in chosen], both), strict=True)
        return [found[index] for index in range(len(rows))]

    def _reference(self, rows: Sequence[Row]) -> list[Tensor]:
        """Log-probabilities of the unsteered model, `[completion vocab]` each, computed once as far as they are kept.

        They do not depend on what was asked for before: continuations of one set share forward passes.
        """
        for row in rows:
            batch = self._together.get(_key(row))
            if batch is not None and _key(row) not in self._kept and self._size() < KEPT_BYTES:
                self._kept |= zip(map(_key, batch), self._levels(batch), strict=True)
        if all(_key(row) in self._kept for row in rows):
            return [self._kept[_key(row)] for row in rows]
        return self._levels(rows)

    def _size(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._kept.values())

    def _levels(self, rows: Sequence[Row]) -> list[Tensor]:
        return self.logits(UNSTEERED, rows, lambda _, logits: logits[:-1].log_softmax(-1))

    def continuations(self, prompts: Sequence[Text], tokens: int, *, among: Sequence[Text] = ()) -> list[Row]:
        """Prompts and the unsteered model's own continuations of them, sampled at temperature 1.

        Args:
            prompts: What is continued.
            tokens: Largest number of tokens to write.
            among: Prompts that are continued together with these. Part of a set is continued as in the whole of it,
                so a search may begin on some of the prompts.
        """
        rows = [self.prompt(text) for text in prompts]
        whole = [self.prompt(text) for text in among]
        written = self._continued(rows if not all(row in whole for row in rows) else whole, tokens)
        if [row[0] for row in written] == rows:
            return written
        known = {tuple(row[0]): row for row in written}
        return [known[tuple(row)] for row in rows]

    def _continued(self, rows: list[list[int]], tokens: int) -> list[Row]:
        key = (tuple(map(tuple, rows)), tokens)
        if key not in self._continuations:
            name = ["continuations", digest([rows, tokens])]
            if self.log is not None and name in self.log:
                written = list(zip(rows, self.log[name], strict=True))
            else:
                texts = generate_texts(
                    self.host, None, rows, max_new_tokens=tokens, temperature=1.0, seed=self.seed, batch=2 * self.batch
                )
                written = [(list(text.prompt), list(text.completion)) for text in texts]
                if self.log is not None:
                    self.log.put(name, [completion for _, completion in written])
            ordered = sorted(written, key=lambda row: -sum(map(len, row)))
            for start in range(0, len(ordered), self.batch):
                batch = ordered[start : start + self.batch]
                self._together |= {_key(row): batch for row in batch}
            self._continuations[key] = written
        return self._continuations[key]

    def texts(self, arm: Arm, prompts: Sequence[Text]) -> list[list[Generation]]:
        """What an arm writes after each prompt, `samples` texts each; all arms draw the same random numbers."""
        rows = [self.prompt(text, arm) for text in prompts]
        key = (arm, tuple(map(tuple, rows)))
        if self._texts is None or self._texts[0] != key:
            drawn = [
                generate_texts(
                    self.host,
                    arm.controller,
                    rows,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    seed=self.seed + 7919 * number,
                    strength=arm.strength,
                    batch=2 * self.batch,
                )
                for number in range(self.samples)
            ]
            self._texts = key, [list(texts) for texts in zip(*drawn, strict=True)]
        return self._texts[1]

    def dose(self, arm: Arm) -> list[list[float]]:
        """The relative size of the control, |u|/|x| from the last prompt token on, a mean over the sites where it acts.

        x is the unsteered state at the site, on the unsteered model's continuations of the first prompts.
        """
        rows = self.continuations(self.prompts[:DOSED], self.max_new_tokens)
        if arm.controller is None:
            return [[math.nan if arm.instruction else 0.0] for _ in rows]
        norms = self._recorded(arm, rows, "u_norm")
        states = self.host.states(
            [[*prompt, *completion] for prompt, completion in rows], list(norms), batch=self.batch
        )
        found = []
        for index, (prompt, completion) in enumerate(rows):
            scored = slice(len(prompt) - 1, len(prompt) + len(completion))
            sizes = (states[site][index][scored].double().cpu().flatten(1).norm(dim=1) for site in norms)
            shares = [norm[index][scored] / size for norm, size in zip(norms.values(), sizes, strict=True)]
            # a token that no loop steers has the dose 0
            found.append(torch.stack(shares).nanmean(0).nan_to_num().tolist())
        return found

    def controls(self, arm: Arm, rows: Sequence[Row]) -> list[Tensor]:
        """The control at the tokens whose logits are scored, `[site completion+1 *shape]` for each row, float64.

        0 at tokens that no loop steers, and of an arm without a controller: one site, of the residual stream.

        Raises:
            ValueError: the sites where the controller acts have several shapes.
        """
        if arm.controller is None:
            width = self.host.shape(Site(0, "resid_post"))
            return [torch.zeros(1, len(completion) + 1, *width, dtype=torch.float64) for _, completion in rows]
        shapes = {self.host.shape(site) for site in arm.controller.sites}
        if len(shapes) > 1:
            raise ValueError(f"{arm.name} acts on states of the shapes {sorted(shapes)}; give it loops of one shape")
        found = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            held = self._recorded(arm, part, "u")
            found += [
                torch.stack([u[index][len(prompt) - 1 : len(prompt) + len(completion)] for u in held.values()])
                for index, (prompt, completion) in enumerate(part)
            ]
        return [u.nan_to_num() for u in found]

    def _recorded(self, arm: Arm, rows: Sequence[Row], signal: str) -> dict[Site, Tensor]:
        """A signal of the whole control at each site where an arm acts, `[row pos ...]`, float64; NaN if unsteered."""
        whole, lengths = [[*prompt, *completion] for prompt, completion in rows], [len(prompt) for prompt, _ in rows]
        ids, mask = pad_rows(whole, self.host.device)
        assert arm.controller is not None
        with torch.no_grad(), steer(self.host, arm.controller, strength=arm.strength, record=(signal,)) as run:
            with run.scoring(lengths):
                self._pass_over(ids, mask)
            names = {site: (held.total or held.own[0])[signal] for site, held in run.signals.items()}
            return {site: run.record[name].double().cpu() for site, name in names.items()}

    def _pass_over(self, ids: Tensor, mask: Tensor) -> None:
        """A forward pass for what is recorded in it."""
        if self.host.remote:
            from steerlens.hosts.traced.served import pass_over

            pass_over(self.host, ids, mask)
        else:
            self.host.logits(ids, mask)

    def check_zero(self, controller: Controller) -> None:
        """Raises RuntimeError unless strength 0 gives the unsteered model's logits, bit for bit."""
        ids = [self.prompt(text) for text in self.prompts[:4]]
        rows = [(row[: max(1, len(row) // 2)], row[max(1, len(row) // 2) :]) for row in ids]
        plain, off = (
            self.logits(arm, rows, lambda _, logits: logits.cpu().clone())
            for arm in (UNSTEERED, Arm("off", controller, 0.0))
        )
        if not all(torch.equal(a, b) for a, b in zip(plain, off, strict=True)):
            gap = max(float((a - b).abs().max()) for a, b in zip(plain, off, strict=True))
            raise RuntimeError(
                f"{controller!r} at strength 0 changes the logits by up to {gap:.3g}; nothing measured with it "
                "would be the effect of its control"
            )

    def at(self, prompts: Sequence[Text]) -> Bench:
        """The same bench with other prompts; what is kept is shared."""
        other = Bench.__new__(Bench)
        other.__dict__.update(self.__dict__ | {"prompts": list(prompts)})
        return other


def _key(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(row[0]), tuple(row[1])


def _steering(arm: Arm) -> Callable[..., Any] | None:
    """An arm's controller for a block that is sent."""
    if arm.controller is None:
        return None
    return partial(apply, controller=arm.controller, strength=arm.strength, record=None)


def _is_chat(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and isinstance(text[0], dict)
