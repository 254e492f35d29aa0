"""A steered model for inspect-ai.

    from inspect_ai import eval
    from steerlens.evaluate.inspect_ai import as_inspect_model

    eval(task, model=as_inspect_model(model, controller))

or by name, `steerlens/NAME` with the model arguments `controller`, `strength` and `library`. Messages go through the
tokenizer's chat template; requests that wait at the same time go through the model together; the controller's signals
are in each output's metadata and in the sample's, under `steerlens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    modelapi,
)
from inspect_ai.solver._task_state import sample_state
from torch import Tensor

from steerlens.core import Controller
from steerlens.evaluate.named import open_controller, open_host
from steerlens.evaluate.scoring import scored_logits
from steerlens.evaluate.texts import prompt_ids
from steerlens.hosts.types import Model as Steerable
from steerlens.steering import steer

#: Options that the model honours.
HONOURED = frozenset({"max_tokens", "temperature", "stop_seqs", "seed", "logprobs", "top_logprobs"})
#: Options that inspect-ai acts on before or after it asks a model.
INSPECTS = frozenset(
    {
        "max_retries",
        "timeout",
        "attempt_timeout",
        "stream_idle_timeout",
        "max_connections",
        "adaptive_connections",
        "system_message",
        "max_tool_output",
        "fail_on_refusal",
        "reasoning_history",
        "cache",
    }
)
#: Of the others, all of which are refused, the values that change nothing.
NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "num_choices": 1,
    "best_of": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "batch": False,
}
#: How long the first of several requests waits for others, in seconds.
WAIT_S = 0.02


class Request:
    """One prompt on its way through the model.

    Attributes:
        output: Its answer, or what was raised, once `done` is set.
    """

    def __init__(self, prompt: list[int], config: GenerateConfig):
        self.prompt, self.config = prompt, config
        self.done = anyio.Event()
        self.output: ModelOutput | BaseException | None = None

    def group(self) -> tuple[Any, ...]:
        """Requests of equal groups are one batch; one with a seed has the random numbers of its own."""
        sampled = (self.config.temperature or 0.0) > 0
        own = id(self) if sampled and self.config.seed is not None else None
        return (len(self.prompt), self.config.max_tokens, self.config.temperature or 0.0, own)


@modelapi(name="steerlens")
class SteeredAPI(ModelAPI):
    """A model under a controller, as inspect-ai asks for it; arguments as in `as_inspect_model`.

    `temperature` is 0 unless asked for. Log probabilities are the steered model's own, before any temperature.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect-ai's own default)
        *,
        model: Any = None,
        controller: Controller | str | Path | None = None,
        strength: float = 1.0,
        library: str = "transformer_lens",
        batch: int = 16,
        trust: bool = False,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        self.host = open_host(model_name if model is None else model, library)
        if getattr(self.host.tokenizer, "chat_template", None) is None:
            raise ValueError("the model's tokenizer has no chat template; set model.tokenizer.chat_template")
        self.controller = open_controller(controller)
        self.strength, self.batch, self.trust = strength, batch, trust
        self._waiting: list[Request] = []
        self._lock = anyio.Lock()

    def max_tokens(self) -> int:
        """Tokens of an answer, unless asked for."""
        return 256

    def max_connections(self) -> int:
        """As many requests at once as go through the model together."""
        return self.batch

    async def generate(
        self, input: list[Any], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The steered model's answer to messages.

        Raises:
            NotImplementedError: tools, messages that are not text, or options that are not honoured.
        """
        check(config)
        if tools:
            raise NotImplementedError("a steered model calls no tools; give the task none")
        request = Request(prompt_ids([_message(message) for message in input], self.host), config)
        self._waiting.append(request)
        if len(self._waiting) == 1:
            await self._lead()
        await request.done.wait()
        if isinstance(request.output, BaseException):
            raise request.output
        assert request.output is not None
        state = sample_state()
        if state is not None and request.output.metadata is not None:
            state.metadata["steerlens"] = request.output.metadata["steerlens"]
        return request.output

    async def _lead(self) -> None:
        """Run everybody who waits."""
        taken: list[Request] = []
        try:
            await anyio.sleep(WAIT_S)
            async with self._lock:
                taken, self._waiting = self._waiting, []
                await anyio.to_thread.run_sync(self._answer, taken)
        except BaseException as error:
            if not taken:
                taken, self._waiting = self._waiting, []
            for request in taken:
                request.output = request.output or RuntimeError(f"the batch of this request failed: {error!r}")
            raise
        finally:
            for request in taken:
                request.done.set()

    def _answer(self, requests: Sequence[Request]) -> None:
        groups: dict[tuple[Any, ...], list[Request]] = {}
        for request in requests:
            groups.setdefault(request.group(), []).append(request)
        for members in groups.values():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                try:
                    for request, output in zip(part, self._batch(part), strict=True):
                        request.output = output
                except Exception as error:
                    for request in part:
                        request.output = error

    def _batch(self, part: Sequence[Request]) -> list[ModelOutput]:
        """Answers to prompts of one length under one configuration."""
        config = part[0].config
        count, length = config.max_tokens or self.max_tokens(), len(part[0].prompt)
        rows = torch.tensor([request.prompt for request in part])
        signals: dict[str, Tensor] = {}
        devices = [self.host.device] if self.host.device.type == "cuda" else []
        # the libraries sample with the global generator; it is put back
        with torch.no_grad(), torch.random.fork_rng(devices=devices, enabled=config.seed is not None):
            if config.seed is not None:
                torch.manual_seed(config.seed)
            temperature = config.temperature or 0.0
            if self.controller is None:
                tokens = self.host.sample(rows, count, temperature=temperature)
            else:
                with steer(self.host, self.controller, strength=self.strength, trust=self.trust) as run:
                    tokens = self.host.sample(rows, count, temperature=temperature)
                signals = {name: value.cpu() for name, value in run.record.items()}
        written = [self._ended(row[length:], count) for row in tokens.tolist()]
        return [
            self._output(request, completion, stopped, {name: value[row] for name, value in signals.items()})
            for row, (request, (completion, stopped)) in enumerate(zip(part, written, strict=True))
        ]

    def _ended(self, completion: list[int], count: int) -> tuple[list[int], bool]:
        end = self.host.tokenizer.eos_token_id
        if end in completion:
            return completion[: completion.index(end)], True
        return completion, len(completion) < count

    def _output(
        self, request: Request, completion: list[int], stopped: bool, signals: dict[str, Tensor]
    ) -> ModelOutput:
        config, tokenizer = request.config, self.host.tokenizer
        text = tokenizer.decode(completion, skip_special_tokens=True)
        found = [text.find(stop) for stop in config.stop_seqs or () if stop and stop in text]
        if found:
            text, stopped = text[: min(found)], True
            # the tokens that the kept text needs
            completion = next(
                completion[:size]
                for size in range(len(completion) + 1)
                if len(tokenizer.decode(completion[:size], skip_special_tokens=True)) >= len(text)
            )
        name = None if self.controller is None else str(self.controller)
        about = {
            "controller": name,
            "strength": self.strength,
            "signals": {signal: _numbers(value) for signal, value in signals.items()},
        }
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=text, model=self.model_name, source="generate"),
                    stop_reason="stop" if stopped else "max_tokens",
                    logprobs=self._logprobs(request, completion) if config.logprobs or config.top_logprobs else None,
                )
            ],
            usage=ModelUsage(
                input_tokens=len(request.prompt),
                output_tokens=len(completion),
                total_tokens=len(request.prompt) + len(completion),
            ),
            metadata={"steerlens": about},
        )

    def _logprobs(self, request: Request, completion: list[int]) -> Logprobs:
        """Of each token of an answer: scored, which equals what the model had while it generated."""
        rows, lengths = [[*request.prompt, *completion]], [len(request.prompt)]
        (logits,) = scored_logits(self.host, self.controller, rows, lengths, strength=self.strength)
        levels, tokenizer = logits.log_softmax(-1), self.host.tokenizer

        def named(token: int, level: float) -> dict[str, Any]:
            text = tokenizer.decode([token])
            return {"token": text, "logprob": level, "bytes": list(text.encode())}

        content = []
        for row, token in zip(levels, completion, strict=False):
            best = row.topk(config_top) if (config_top := request.config.top_logprobs or 0) else None
            top = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
            others = [TopLogprob(**named(other, level)) for other, level in top]
            content.append(Logprob(**named(token, float(row[token])), top_logprobs=others or None))
        return Logprobs(content=content)


def as_inspect_model(
    model: Steerable,
    controller: Controller | str | Path | None = None,
    *,
    strength: float = 1.0,
    library: str = "transformer_lens",
    batch: int = 16,
    trust: bool = False,
    config: GenerateConfig | None = None,
) -> Model:
    """A steered model as inspect-ai's `eval(task, model=...)` takes it.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or a host; or the name of a model, see `library`.
        controller: What steers, or the file of a controller; None for the model as it is.
        strength: Factor on every control.
        library: What loads a model that is given by name: `"transformer_lens"` or `"nnsight"`.
        batch: Requests in one call of the model's `generate`. Prompts of the same number of tokens share one, so that
            none is padded; a request that samples from a seed has a call of its own, so that nobody changes its answer.
        trust: As in `steer`.
        config: Options for every request.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    config = config or GenerateConfig()
    name = model if isinstance(model, str) else type(model).__name__
    options: dict[str, Any] = {"strength": strength, "library": library, "batch": batch, "trust": trust}
    api = SteeredAPI(name, config=config, model=model, controller=controller, **options)
    return Model(api, config)


def check(config: GenerateConfig) -> None:
    """Refuse options that would change the answer and are not honoured.

    Raises:
        NotImplementedError: with the options and their values.
    """
    asked = {name: value for name in type(config).model_fields if (value := getattr(config, name)) is not None}
    other = {
        name: value
        for name, value in asked.items()
        if name not in HONOURED | INSPECTS and not (name in NEUTRAL and value == NEUTRAL[name])
    }
    if other:
        named = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise NotImplementedError(f"a steered model does not honour {named}; it does {', '.join(sorted(HONOURED))}")


def _message(message: Any) -> dict[str, str]:
    if message.role not in ("system", "user", "assistant") or getattr(message, "tool_calls", None):
        raise NotImplementedError(f"a steered model calls no tools, but a message is of the role {message.role!r}")
    if not isinstance(message.content, str) and any(part.type != "text" for part in message.content):
        raise NotImplementedError("a steered model reads text; a message holds something else")
    return {"role": message.role, "content": message.text}


def _numbers(values: Tensor) -> list[float | None]:
    """A scalar signal's value at each token, None where nothing was steered."""
    return [None if math.isnan(value) else round(value, 6) for value in values.double().flatten().tolist()]
