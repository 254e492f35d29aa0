"""Texts that a model writes, steered and not, from seeds that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from steerlens.core import Controller
from steerlens.core.progress import bar
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Host, host_of
from steerlens.hosts.types import Model
from steerlens.steering import steer


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
        prompt: Token ids of the prompt.
        completion: Token ids of what follows, an end token included.
        text: The completion as text, without special tokens; empty if the model has no tokenizer.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    text: str


def generate_texts(
    model: Model,
    controller: Controller | None,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    strength: float = 1.0,
    batch: int = 32,
    prepend_bos: bool | None = None,
    trust: bool = False,
) -> list[Generation]:
    """Continuations of prompts, in their order.

    Prompts of the same number of tokens go through the model together, so none is padded. Each such batch is sampled
    from a seed of its own: the same random numbers for every controller.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or its host.
        controller: What steers; None generates unsteered.
        prompts: Strings, chat messages (answered by the assistant) or token ids.
        max_new_tokens: Largest number of tokens to write.
        temperature: 0 is greedy.
        seed: Of the sampling.
        strength: Factor on every control.
        batch: Prompts in one call of the model's `generate`.
        prepend_bos: As in `Pairs`.
        trust: As in `steer`.

    Raises:
        ValueError: a prompt without tokens.
    """
    host = host_of(model)
    ids = [prompt_ids(prompt, host, prepend_bos) for prompt in prompts]
    if not all(ids):
        raise ValueError(f"the prompt {prompts[ids.index([])]!r} has no tokens; there is nothing to go on from")
    found: dict[int, Generation] = {}
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(ids):
        by_length.setdefault(len(prompt), []).append(index)
    groups = [
        members[start : start + batch]
        for _, members in sorted(by_length.items())
        for start in range(0, len(members), batch)
    ]
    for number, members in enumerate(bar(groups, desc="writing texts")):
        rows = torch.tensor([ids[index] for index in members])
        # the libraries sample with the global generator; it is put back
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(host)):
            torch.manual_seed(seed * 1_000_003 + number)
            if controller is None:
                tokens = host.sample(rows, max_new_tokens, temperature=temperature)
            else:
                with steer(host, controller, strength=strength, record=None, trust=trust):
                    tokens = host.sample(rows, max_new_tokens, temperature=temperature)
        for index, row in zip(members, tokens.tolist(), strict=True):
            found[index] = _generation(host, ids[index], row[len(ids[index]) :])
    return [found[index] for index in range(len(prompts))]


def prompt_ids(prompt: Text, host: Host, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of a prompt that is to be continued; chat messages end where the assistant begins to answer."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) and prompt[-1]["role"] != "assistant":
        template = host.tokenizer.apply_chat_template
        return list(template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"])
    return list(tokenize(prompt, host, prepend_bos)[0])


def with_instruction(text: Text, instruction: str, host: Host) -> Text:
    """A text after an instruction: a line before a string, the system message of a chat."""
    if not instruction:
        return text
    if isinstance(text, str):
        return f"{instruction}\n{text}"
    if isinstance(text, tuple):
        return cast(Text, (with_instruction(text[0], instruction, host), text[1]))
    if isinstance(text, list) and isinstance(text[0], dict):
        if text[0]["role"] == "system":
            merged = {"role": "system", "content": f"{instruction}\n{text[0]['content']}"}
            return [merged, *text[1:]]
        return [{"role": "system", "content": instruction}, *text]
    ids = [int(token) for token in text]
    bos = getattr(host.tokenizer, "bos_token_id", None)
    head = ids[:1] if ids[0] == bos else []
    return [*head, *host.tokenizer(instruction + "\n", add_special_tokens=False)["input_ids"], *ids[len(head) :]]


def _generation(host: Host, prompt: list[int], completion: list[int]) -> Generation:
    end = getattr(host.tokenizer, "eos_token_id", None)
    if end in completion:
        completion = completion[: completion.index(end) + 1]
    text = "" if host.tokenizer is None else host.tokenizer.decode(completion, skip_special_tokens=True)
    return Generation(tuple(prompt), tuple(completion), text)


def _cuda(host: Host) -> list[Any]:
    return [host.device] if host.device.type == "cuda" else []
