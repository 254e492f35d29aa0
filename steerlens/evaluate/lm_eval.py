"""A steered model for lm-evaluation-harness.

    import lm_eval
    from steerlens.evaluate.lm_eval import SteeredLM

    lm_eval.simple_evaluate(model=SteeredLM(model, controller), tasks=["truthfulqa_mc2"])

Each request has its own prompt length, so that a choice is scored as the steered model would have generated it. A
wrapped Hugging Face model is scored by the harness in one pass over prompt and answer, in which a controller at
`where="last"` acts at the last token only, the one that no score reads.

Importing this module registers the name `steerlens`: `simple_evaluate(model="steerlens", model_args={...})`. It is also
declared as an entry point of the group `lm_eval.models`, which lm-eval up to 0.4.13 does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from steerlens.core import Controller
from steerlens.evaluate.named import open_controller, open_host
from steerlens.evaluate.scoring import log_probabilities, scored_logits
from steerlens.evaluate.texts import generate_texts
from steerlens.hosts.types import Model

#: A request as strings, and its context and continuation as token ids.
Encoded = tuple[tuple[str, str], list[int], list[int]]
#: Generation options of tasks that are honoured, and values of others that change nothing.
HONOURED = ("until", "max_gen_toks", "do_sample", "temperature")
NEUTRAL: dict[str, Any] = {"top_p": 1, "top_k": 0, "num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}


@register_model("steerlens")
class SteeredLM(TemplateLM):
    """A model under a controller, as lm-evaluation-harness asks for it.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or a host such as `steerlens.remote(model)`; or
            the name of a model, see `library`.
        controller: What steers, or the file of a controller; None for the model as it is.
        strength: Factor on every control.
        library: What loads a model that is given by name: `"transformer_lens"` or `"nnsight"`.
        batch_size: Rows in one forward pass.
        max_length: Longest row in tokens; longer ones lose tokens of their prompt, from its beginning. Default: the
            model's context.
        max_gen_toks: Longest generation of a task that asks for no length.
        seed: Of sampling, in tasks that sample.
        prepend_bos: Whether prompts start with BOS; default: as the model's library does.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: Model,
        controller: Controller | str | Path | None = None,
        *,
        strength: float = 1.0,
        library: str = "transformer_lens",
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        prepend_bos: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.host = open_host(model, library)
        if self.host.tokenizer is None:
            raise ValueError("the model has no tokenizer; lm-evaluation-harness gives texts")
        if device is not None and torch.device(device) != self.host.device:
            raise ValueError(f"device={device!r}, but the model is on {self.host.device}; move the model")
        self.controller = open_controller(controller)
        self.strength = strength
        # the harness hands its own "auto" through
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else min(16, max_batch_size or 16)
        self.max_length = max_length or _context(self.host)
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.prepend_bos = self.host.prepends_bos if prepend_bos is None else prepend_bos
        self.tokenizer = self.host.tokenizer
        self._device = self.host.device

    # -- text and tokens ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS for a tokenizer without BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, for the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with BOS in front unless the text brings it or none is wanted."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        wanted = self.prepend_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if wanted and ids[:1] != [self.prefix_token_id] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as a text, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- what the harness asks ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """Log probability of each continuation, in nats, and whether it is the greedy one."""
        rows, lengths = [], []
        for (context, continuation), given, wanted in requests:
            if not wanted:
                raise ValueError(f"{continuation!r} after {context!r} has no token to score")
            # as in the harness: a row is read up to its last token, which is predicted only
            row = [*given, *wanted][-(self.max_length + 1) :]
            if len(row) <= len(wanted):
                raise ValueError(f"a continuation of {len(wanted)} tokens leaves no context in {self.max_length}")
            rows.append(row)
            lengths.append(len(row) - len(wanted))

        def answer(index: int, logits: Tensor) -> tuple[float, bool]:
            wanted = rows[index][lengths[index] :]
            greedy = logits[: len(wanted)].argmax(-1).tolist() == wanted
            return float(log_probabilities(logits, wanted).double().sum()), greedy

        # the token after which nothing is predicted needs no forward pass, and may lie beyond the context
        found = scored_logits(
            self.host,
            self.controller,
            [row[:-1] for row in rows],
            lengths,
            strength=self.strength,
            batch=self.batch_size,
            reduce=answer,
        )
        for (strings, _given, _wanted), value in zip(requests, found, strict=True):
            if strings != ("", ""):
                self.cache_hook.add_partial("loglikelihood", strings, value)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in nats; each window's first token is its prompt."""
        windows: list[Encoded] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((("", ""), context, continuation))
                owner.append(index)
        sums = [0.0] * len(requests)
        for index, (value, _greedy) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, cut before the first stop string.

        Raises:
            ValueError: a task asks for a way of sampling that is not supported, as `top_p=0.9`.
        """
        groups: dict[tuple[int, float], list[int]] = {}
        stops: list[list[str]] = []
        for index, request in enumerate(requests):
            options = _checked(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            stops.append([text for text in options["until"] if text])
            groups.setdefault((options["max_gen_toks"], float(options.get("temperature", 0.0))), []).append(index)
        found = [""] * len(requests)
        for (count, temperature), members in groups.items():
            room = self.max_length - count
            if room < 1:
                raise ValueError(f"{count} new tokens leave no room for a prompt in {self.max_length}")
            texts = generate_texts(
                self.host,
                self.controller,
                [self.tok_encode(requests[index].args[0])[-room:] for index in members],
                max_new_tokens=count,
                temperature=temperature,
                seed=self.seed,
                strength=self.strength,
                batch=self.batch_size,
            )
            for index, written in zip(members, texts, strict=True):
                found[index] = cut(written.text, stops[index])
                self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
        return found


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of its stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    other = {name: value for name, value in options.items() if name not in HONOURED and value != NEUTRAL.get(name)}
    if other:
        asked = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(f"a task asks for {asked}; honoured are {', '.join(HONOURED)}")
    return options


def _context(host: Any) -> int:
    """Longest text of a model, in tokens."""
    config = getattr(host.model, "cfg", None) or host.model.config
    found = getattr(config, "n_ctx", None) or getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ValueError("the model's configuration names no context length; give max_length=")
    return found
