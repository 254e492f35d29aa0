"""A steered model, computed again without steerlens: plain PyTorch hooks, one row and one token at a time, no cache.

Of a controller it reads data only (`Loop` fields and the tensors of the laws below); which tokens a loop touches,
gates, schedules, memory, adding and recording are written a second time here, in the most naive way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerlens.core import Condition, Law

#: Hugging Face names: blocks, attention, its output map, MLP, its output map, norms that follow the two branches.
LAYOUTS = {
    "llama": ("layers", "self_attn", "o_proj", "mlp", "down_proj", None, None),
    "gemma": (
        *("layers", "self_attn", "o_proj", "mlp", "down_proj"),
        *("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": ("h", "attn", "c_proj", "mlp", "c_proj", None, None),
}


class Push(Law):
    """A constant vector."""

    def __init__(self, vector):
        self.vector = vector

    def control(self, x, layers, sequence):
        return self.vector.expand_as(x)

    def act(self, x, now):
        return self.control(x, now.layers, now.sequence), {}


class Pull(Law):
    """Feedback on one feature: `u = gain (level - v x) v`."""

    def __init__(self, v, gain, level):
        self.v, self.gain, self.level = v, gain, level

    def error(self, x):
        return (self.level - x @ self.v)[..., None]

    def control(self, x, layers, sequence):
        return self.gain * self.error(x) * self.v

    act = Push.act


class Layered(Law):
    """Feedback on the sum of the errors of all layers so far in this pass, each token by itself."""

    __init__, error, act = Pull.__init__, Pull.error, Push.act

    def control(self, x, layers, sequence):
        layers["total"] = layers.get("total", 0) + self.error(x)
        return self.gain * layers["total"] * self.v


class Running(Law):
    """Feedback on the sum of the errors of all tokens of the sequence so far, squashed; each layer by itself."""

    error, act = Pull.error, Push.act

    def __init__(self, v, gain, level, name):
        self.v, self.gain, self.level, self.name = v, gain, level, name

    def control(self, x, layers, sequence):
        before = sequence.get(self.name)
        total = self.error(x).cumsum(1)
        total = total if before is None else total + before
        sequence[self.name] = total[:, -1:]
        return self.gain * torch.tanh(total) * self.v


class Above(Condition):
    """Open if the pooled state of the prompt lies above a threshold on a direction."""

    signals = ("height",)

    def __init__(self, v, threshold):
        self.v, self.threshold = v, threshold

    def decide(self, pooled):
        height = pooled[0] @ self.v
        return (height > self.threshold).to(height.dtype), {"height": height}


def selected(where: Any, t: int, prompt: int, row: int = 0) -> bool:
    """Whether `where` names the token at absolute position t of a row whose prompt has `prompt` tokens."""
    if isinstance(where, str):
        if t == 0:
            return False
        return {
            "last": t >= prompt - 1,
            "last_prompt": t == prompt - 1,
            "generated": t >= prompt,
            "prompt": t < prompt,
            "all": True,
        }[where]
    if isinstance(where, slice):
        low = 0 if where.start is None else where.start
        high = float("inf") if where.stop is None else where.stop
        return (low + prompt if low < 0 else low) <= t < (high + prompt if high < 0 else high)
    if isinstance(where, Tensor):
        mine = where if where.ndim == 1 else where[row if len(where) > 1 else 0]
        return t < len(mine) and bool(mine[t])
    return bool(where(torch.tensor([[t]]))[0, 0])


class Reference:
    """A Hugging Face model under a controller.

    Args:
        model: A Hugging Face model with a head, of one of the `LAYOUTS`.
        family: Its layout.
        controller: Its loops are read, nothing of it is called but the laws' `control` and the conditions' `decide`.
    """

    def __init__(self, model: Any, family: str, controller: Any = None):
        self.model, self.family = model, family
        self.loops = [] if controller is None else list(controller.loops)

    def row(self, tokens: Sequence[int], prompt: Any, row: int = 0) -> tuple[Tensor, dict[Any, Tensor]]:
        """Logits `[pos vocab]`, and what is added at each acting site, `[pos ...]`, of a row of real tokens.

        Args:
            tokens: Of the row.
            prompt: Number of prompt tokens; or one for each token, the number that was so when it went through.
            row: Of the batch, for masks that differ by row.
        """
        ends = [prompt] * len(tokens) if isinstance(prompt, int) else list(prompt)
        # a prompt in parts is another prompt with each of them, and is decided about anew
        gates = {
            end: [
                [self._decide(gate, tokens[:end], row) for gate in loop.gates if not gate.each_token]
                for loop in self.loops
            ]
            for end in set(ends)
        }
        states: dict[Any, Tensor] = {}
        controls: dict[Any, Tensor] = {}
        sequence: dict[Any, Any] = {}
        layers: list[dict[Any, Any]] = [{} for _ in tokens]

        def act(site: Any, x: Tensor) -> Tensor:
            states[site] = x
            mine = [(index, loop) for index, loop in enumerate(self.loops) if loop.act == site]
            added = torch.zeros_like(x)
            for index, loop in mine:
                sensed = x + added if loop.sense == loop.act else states[loop.sense]
                for t in range(len(tokens)):
                    if not selected(loop.where, t, ends[t], row):
                        continue
                    token = sensed[:, t : t + 1]
                    u = loop.law.control(
                        token, layers[t].setdefault(loop.group, {}), sequence.setdefault(loop.group, {})
                    )
                    factor = loop.strength
                    for decided in gates[ends[t]][index]:
                        factor *= decided
                    for gate in loop.gates:
                        if gate.each_token:
                            here = [s.site == loop.act for s in gate.summaries]
                            read = zip(gate.summaries, here, strict=True)
                            looked = [x + added if same else states[s.site] for s, same in read]
                            decided = float(gate.condition.decide([value[:, t] for value in looked])[0][0])
                            factor *= 1 - decided if gate.inverted else decided
                    for schedule in loop.schedules:
                        step = t - (ends[t] - 1)
                        factors = schedule.factors.tolist()
                        factor *= schedule.prompt if step < 0 else factors[min(step, len(factors) - 1)]
                    # out of place: the law may sense what is added at this site by the loops before it
                    added = added.index_add(1, torch.tensor([t]), (factor * u).to(added))
            if mine:
                controls[site] = added[0]
            return added

        sites = {site for loop in self.loops for site in (loop.act, loop.sense)}
        sites |= {s.site for loop in self.loops for gate in loop.gates if gate.each_token for s in gate.summaries}
        logits = self._run(tokens, sites, act)
        return logits, controls

    def greedy(self, tokens: Sequence[int], count: int, row: int = 0) -> list[int]:
        """A prompt and its greedy continuation; every token comes from a pass over all that is before it."""
        text = list(tokens)
        for _ in range(count):
            text.append(int(self.row(text, len(tokens), row)[0][-1].argmax()))
        return text

    def _decide(self, gate: Any, prompt: Sequence[int], row: int) -> float:
        """A gate's decision on the unsteered prompt."""
        pooled = []
        for summary in gate.summaries:
            states: dict[Any, Tensor] = {}

            def note(site: Any, x: Tensor, states: dict[Any, Tensor] = states) -> Tensor:
                states[site] = x
                return torch.zeros_like(x)

            self._run(prompt, {summary.site}, note)
            chosen = [t for t in range(len(prompt)) if selected(summary.where, t, len(prompt), row)]
            x = states[summary.site][0, chosen]
            if not chosen:
                pooled.append(torch.zeros_like(states[summary.site][:, 0]))
            else:
                pooled.append((x.mean(0) if summary.pool == "mean" else x.square().mean(0).sqrt())[None])
        decided = float(gate.condition.decide(pooled)[0][0])
        return 1 - decided if gate.inverted else decided

    def _run(self, tokens: Sequence[int], sites: Any, act: Any) -> Tensor:
        """Logits of one row; `act(site, state)` returns what to add there."""
        layers, attention, out, mlp, down, after_attention, after_mlp = LAYOUTS[self.family]
        blocks = getattr(self.model.base_model, layers)
        handles = []
        for site in sorted(sites):
            block = blocks[site.layer]
            attn, feed = getattr(block, attention), getattr(block, mlp)
            branch = getattr(block, after_attention) if after_attention else attn
            into = {"resid_pre": block, "z": getattr(attn, out), "mlp_post": getattr(feed, down)}
            from_ = {
                "resid_post": block,
                "attn_out": branch,
                "resid_mid": branch,
                "mlp_out": getattr(block, after_mlp) if after_mlp else feed,
            }
            if site.point in into:
                heads = self.model.config.num_attention_heads if site.point == "z" else 0
                hook = partial(_before, partial(act, site), heads)
                handles.append(into[site.point].register_forward_pre_hook(hook, with_kwargs=True))
            elif site.point == "resid_mid":
                entered: list[Tensor] = []
                handles.append(block.register_forward_pre_hook(partial(_keep, entered), with_kwargs=True))
                handles.append(branch.register_forward_hook(partial(_after, partial(_mid, act, site, entered))))
            else:
                handles.append(from_[site.point].register_forward_hook(partial(_after, partial(act, site))))
        try:
            with torch.no_grad():
                return self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()


def _state(args: Any, kwargs: Any) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _keep(entered: list[Tensor], module: Any, args: Any, kwargs: Any) -> None:
    entered[:] = [_state(args, kwargs)]


def _mid(act: Any, site: Any, entered: list[Tensor], branch: Tensor) -> Tensor:
    return act(site, entered[0] + branch)


def _before(act: Any, heads: int, module: Any, args: Any, kwargs: Any) -> Any:
    x = _state(args, kwargs)
    changed = x + act(x.unflatten(-1, (heads, -1))).flatten(-2) if heads else x + act(x)
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": changed}
    return (changed, *args[1:]), kwargs


def _after(act: Any, module: Any, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output + act(output)
    return (output[0] + act(output[0]), *output[1:])
