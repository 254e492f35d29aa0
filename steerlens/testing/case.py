"""A method on a host, with a model: what the checks run on."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steerlens import methods
from steerlens.core import Controller
from steerlens.fit.contrast import Pairs
from steerlens.fit.method import Method, check_exports, declared, exported
from steerlens.models import tiny
from steerlens.steering import Run, steer

#: Prompts and completions below the tiny models' vocabulary; last tokens differ, so that layer 0 has a direction too.
POSITIVE = [([5, 9], [12, 31]), ([5], [14, 7, 22, 33]), ([8], [9, 41, 35])]
NEGATIVE = [([5, 9], [13, 40]), ([5], [15, 7, 23, 44]), ([8], [10, 41, 46])]
#: One ends as a negative text does and one as a positive, since some methods act on one of the two only.
PROMPTS = [3, 17, 25, 29, 41, 22, 46], [3, 17, 25, 29, 41, 22, 9]
OTHER = [7, 30, 31, 32, 33]


def discover_methods() -> dict[str, Callable[..., Controller]]:
    """Every method that `steerlens.methods` exports.

    Raises:
        ImportError: a file of `steerlens.methods` whose method is not exported, by name.
    """
    check_exports(methods)
    return {name: method.function for name, method in exported(methods).items()}


def discover_hosts() -> list[str]:
    """The hosts whose library is installed."""
    hosts = []
    if importlib.util.find_spec("transformer_lens"):
        hosts.append("bridge")
        try:
            from transformer_lens import HookedTransformer  # noqa: F401
        except ImportError:  # TransformerLens 4
            pass
        else:
            hosts.append("hooked")
    if importlib.util.find_spec("nnsight"):
        hosts.append("nnsight")
    return hosts


class Case:
    """A method on a host, with a tiny random model of its own.

    Args:
        method: Name of a method of steerlens, or a method of your own.
        host: One of `discover_hosts()`.
        family: `"llama"`, `"gemma"` or `"gpt2"`.
        dtype, device: Of the model.
        model: A model to use instead of a tiny one; `other` then is not available.
        remote: Run forward passes and generations of an nnsight model on a server: True, or its URL.
        options: Arguments of every fit, such as `{"paper": True}`; default: the method's defaults.
    """

    def __init__(
        self,
        method: str | Callable[..., Controller],
        host: str,
        *,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        model: Any = None,
        remote: bool | str = False,
        options: dict[str, Any] | None = None,
    ):
        known = declared(discover_methods()[method] if isinstance(method, str) else method)
        if known is None:
            raise TypeError(f"{method!r} is no method; decorate it with steerlens.fit.method.method")
        self.declared: Method = known
        self.method, self.host, self.family, self.dtype, self.device = known.name, host, family, dtype, device
        self.options = dict(options or {})
        self.where = {"remote": remote} if remote else {}
        if model is not None:
            self.model = model

    def other(self, **changes: Any) -> Case:
        """The same case with another host, family, dtype or device."""
        fields: dict[str, Any] = {"host": self.host, "family": self.family, "dtype": self.dtype, "device": self.device}
        fields["options"] = self.options
        return Case(self.declared.function, **(fields | changes))

    @cached_property
    def model(self) -> Any:
        """The tiny model on this host; the weights are the same on all."""
        return tiny(self.family, host=self.host, dtype=self.dtype, device=self.device)

    @cached_property
    def data(self) -> Pairs:
        """Contrast texts as token ids of prompts and completions, the same on every host."""
        return Pairs(POSITIVE, NEGATIVE)

    def fit(self, data: Any = None, **options: Any) -> Controller:
        """Fit the method, with its defaults and the case's texts unless others are given."""
        function, options = self.declared.function, self.options | options
        if "progress" in inspect.signature(function).parameters:
            options.setdefault("progress", False)
        return function(self.model, self.data if data is None else data, **options)

    @cached_property
    def controller(self) -> Controller:
        """The method fitted with its defaults."""
        return self.fit()

    @cached_property
    def prompt(self) -> list[int]:
        """The first of `PROMPTS` that the method changes, or the first where it changes none."""
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            plain = self.logits(ids)
            with self.steer():
                if (self.logits(ids) - plain).abs().max() > 1e-4:
                    return prompt
        return PROMPTS[0]

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of one forward pass `[batch pos vocab]`."""
        ids = ids.to(self.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(self.device)
        if self.host == "nnsight":
            with self.model.trace({"input_ids": ids, "attention_mask": mask}, **self.where):
                logits = self.model.output.logits.save()
            return logits  # noqa: RET504 (bound by the trace)
        return self.model(ids, attention_mask=mask)

    def generate(self, ids: Tensor, count: int = 6, *, cache: bool = True) -> Tensor:
        """Greedy continuation of unpadded prompts, `[batch pos+count]`."""
        ids = ids.to(self.device)
        if self.host == "nnsight":
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": cache}
            with self.model.generate(ids, **options, **self.where) as tracer:
                tokens = tracer.result.save()
            return tokens  # noqa: RET504 (bound by the trace)
        return self.model.generate(
            ids, max_new_tokens=count, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache, verbose=False
        )

    def steer(self, **options: Any) -> Run:
        """Attach the fitted controller."""
        return steer(self.model, options.pop("controller", None) or self.controller, **options)

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains, relative to the logits' scale."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    def close(self, a: Tensor, b: Tensor, what: str, factor: float = 1.0) -> None:
        """Asserts equality up to rounding."""
        scale = max(1.0, float(b.detach().abs().max()))
        difference = float((a.detach() - b.detach().to(a)).abs().max())
        assert difference <= factor * self.tolerance * scale, f"{what} differs by {difference:.2e} (scale {scale:.1f})"

    def __repr__(self) -> str:
        return f"{self.method}-{self.host}-{self.family}-{str(self.dtype).removeprefix('torch.')}"


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that steering could leave behind on a model: weights, hooks of all kinds, hook names, edits."""
    module = getattr(model, "_module", model)
    table = getattr(model, "_hook_registry", None)
    points = table if table is not None else getattr(model, "hook_dict", {})
    return {
        "weights": {
            f"{path}.{name}": (id(value), value.data_ptr(), value._version)
            for path, part in module.named_modules()
            for name, value in [*part._parameters.items(), *part._buffers.items()]
            if value is not None
        },
        "torch hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
        },
        "lens hooks": {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in points.items()},
        "table": sorted(getattr(model, "mod_dict", {})) if table is None else sorted(table),
        "edits": [id(edit) for edit in getattr(model, "_edits", [])],
        "attributes": sorted(vars(model)),
    }


@contextmanager
def padding(model: Any, side: str) -> Iterator[None]:
    """Let a model's tokenizer pad on one side, `"left"` or `"right"`: HookedTransformer asks it which mask it needs."""
    before = model.tokenizer.padding_side
    model.tokenizer.padding_side = side
    try:
        yield
    finally:
        model.tokenizer.padding_side = before
