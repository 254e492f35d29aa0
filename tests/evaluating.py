"""What the tests of evaluations share: texts of the tiny vocabulary, a controller, and the same steering by hand."""

from __future__ import annotations

import random

import torch

import steerlens as sl
from steerlens.core import Loop
from steerlens.models import tiny


def words(count, seed):
    """Strings of 3 to 7 words."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(97)}" for _ in range(draw.randint(3, 7))) for _ in range(count)]


def items(count, seed=0):
    """`(prompt, wanted, unwanted)`; completions begin with a space, as prompt and completion are joined as they are."""
    sides = ([f" {text}" for text in words(count, seed + number)] for number in (1, 2))
    return list(zip(words(count, seed), *sides, strict=True))


def vector(seed=1):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def controller(where="last", size=1.0, layer=1):
    return sl.Controller([Loop(sl.Add(size * vector()), sl.Site(layer, "resid_post"), where=where)])


class ByHand:
    """The tiny Hugging Face model with a plain forward hook that adds the vector from a column on."""

    def __init__(self):
        self.model, self.tokenizer = tiny(host="hf")

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probabilities(self, row, start=None, size=1.0):
        """`[pos vocab]` of one row alone, steered from column `start` on; None: not at all."""

        def add(module, args, output):
            state = output[0] if isinstance(output, tuple) else output
            state = torch.cat([state[:, :start], state[:, start:] + size * vector()], dim=1)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handle = None if start is None else self.model.model.layers[1].register_forward_hook(add)
        with torch.no_grad():
            logits = self.model(torch.tensor([row])).logits[0]
        if handle is not None:
            handle.remove()
        return logits.double().log_softmax(-1)

    def level(self, prompt, completion, steered, per="token", size=1.0):
        """Log probability of a completion, its mean or sum over tokens."""
        head, tail = self.ids(prompt), self.ids(completion)
        found = self.log_probabilities([*head, *tail], len(head) - 1 if steered else None, size)
        own = [float(found[len(head) - 1 + index, token]) for index, token in enumerate(tail)]
        return sum(own) / len(own) if per == "token" else sum(own)
