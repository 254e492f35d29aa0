"""nnsight: edits that steer every trace and every generation, here or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from einops import rearrange
from nnsight.intervention.backends.remote import RemoteError
from nnsight.intervention.envoy import Envoy
from nnsight.modeling.mixins.remotable import Remotable
from torch import Tensor, nn

from steerlens.core import Pass, Site
from steerlens.hosts.attachment import Attachment
from steerlens.hosts.base import Found, Host, UntrustedError
from steerlens.hosts.blocks.graph import pool
from steerlens.hosts.blocks.learning import Learner
from steerlens.hosts.blocks.nominal import Nominal
from steerlens.hosts.blocks.second_pass import Spot, gather
from steerlens.hosts.blocks.selfcheck import doubts_about
from steerlens.hosts.steered import Steered, unsteered
from steerlens.hosts.traced import known
from steerlens.hosts.traced.anatomy import UNTRUSTED, Anatomy, call_beside, gradients_at
from steerlens.hosts.traced.differences import STEP, WIDE_STEP, Probe, differences
from steerlens.hosts.traced.edit import Passes, Plain, StoodDown, Tap, follow, spots_of, steers
from steerlens.hosts.traced.known import KnownPasses
from steerlens.hosts.traced.remote import Limits, RemoteForms, backend
from steerlens.hosts.weights import matrix_of, sides_swapped


def claim(model: Any) -> Host | None:
    """A host for an nnsight model, or None."""
    return TracedHost(model) if isinstance(model, Envoy) else None


class TracedHost(Anatomy, Host):
    """An nnsight `TransformersModel` or `LanguageModel` of any architecture, see `hosts.roles`."""

    library = "nnsight"

    def __init__(self, model: Any, remote: bool | str = False, timeout_s: float = 3600.0):
        Anatomy.__init__(self, model)
        self.remote = remote
        self.timeout_s = timeout_s

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer does it by itself."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    def attach(self, run: Pass, *, payload_limit: int, timeout_s: float) -> Attachment:
        """An edit on the model's root: it also steers `generate`, sessions and remote runs."""
        return TracedAttachment(self, run, Limits(payload_limit, timeout_s))

    def wraps(self, steered: Steered) -> list[Any]:
        """What stands around the model's methods while it is steered here; nothing if its weights are elsewhere."""
        if self.away:
            return []
        return known.wraps(self.base._module, self.model._module, self.model.interleaver, steered)

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        return self.resting(lambda: Anatomy.nominal(self, tokens))

    @property
    def block(self) -> nn.Module:
        """The first block."""
        return self.layers[0]._module

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Through a trace, which runs the edits; `_logits` calls the module below them."""
        where = backend(self.model, self.remote, self.timeout_s) if self.remote else None
        if where is None:
            self.need_weights("running the model", ", or run it on a server: steerlens.remote(model)")
        # the block names the model alone: what it names is sent to a server, and a host holds more than can be sent
        model, ids = self.model, ids.to(self.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(self.device)
        with model.trace({"input_ids": ids, "attention_mask": mask}, backend=where):
            logits = model.output.logits.save()
        return logits  # noqa: RET504 (bound by the trace)

    def logits_with_graph(self, ids: Tensor, mask: Tensor) -> Tensor:
        """From a trace here; a server sends back no graph."""
        self.need_weights("training a vector")
        return super().logits_with_graph(ids, mask)

    def sample(self, ids: Tensor, count: int, *, temperature: float) -> Tensor:
        """Prompts and their continuations, by the model's own `generate`."""
        where = backend(self.model, self.remote, self.timeout_s) if self.remote else None
        if where is None:
            self.need_weights("generating", ", or generate on a server: steerlens.remote(model)")
        ids = ids.to(self.device)
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": temperature > 0}
        if temperature > 0:
            # the whole vocabulary, whatever the model's generation config prefers
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with self.model.generate(inputs, **options, backend=where) as tracer:
            tokens = tracer.result.save()
        return tokens  # noqa: RET504 (bound by the trace)

    def doubts(self, sites: Sequence[Site]) -> str | None:
        """What speaks against the points, if the weights are here."""
        if self.away or self.remote:
            return None

        def read(ids: Tensor, wanted: list[Site]) -> dict[Site, Tensor]:
            module = self.model._module
            with StoodDown(self.base), torch.inference_mode(False), torch.no_grad():
                return gather(self._spots(wanted), lambda: module(input_ids=ids.to(self.device), use_cache=False))

        return doubts_about(self.model, self.layouts, sites, read, self.missing)

    def entrance(self) -> nn.Module:
        """The first block."""
        return self.layers[0]._module

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Without the edits of ours; those of the user stay."""
        model, held = self.model, self.model._edits
        with unsteered(model):
            model._edits = [edit for edit in held if not steers(edit)]
            try:
                yield
            finally:
                model._edits = held

    def learner(self) -> Learner:
        """The Hugging Face model inside."""
        self.need_weights("differentiating the parameters")
        self.need_parameters()
        return Learner(self.model._module, lambda: StoodDown(self.base), self._spots)

    def _spots(self, sites: Sequence[Site]) -> dict[Site, Spot]:
        return spots_of([self.tap(site) for site in sites])

    def head_writes(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`."""
        self.need_weights("taking attention apart")
        self.need_plain_matrices()
        module = self.part(Site(layer, "z"))
        weight = matrix_of(module) if sides_swapped(module) else matrix_of(module).T
        return rearrange(weight.detach(), "(head d_head) d -> head d_head d", head=self.n_heads)

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor | None, sites: Sequence[Site]) -> list[Tensor]:
        if not self.remote:
            self.need_weights("reading activations", ", or read on a server with steerlens.remote(model)")
        taps = [self.tap(site) for site in sites]
        for tap in taps:
            tap.rows = len(ids)
        model = self.model
        # stopping before the unembedding would cut off edits of the user's at later layers
        early = not model._edits
        where = backend(model, self.remote, self.timeout_s) if self.remote else None
        with torch.no_grad(), model.trace({"input_ids": ids, "attention_mask": mask}, backend=where) as tracer:
            found = nnsight.save([pool(tap.value(), weights) for tap in taps])
            if early:
                tracer.stop()
        return [value.cpu() for value in found]

    def _gradients(
        self, ids: Tensor, mask: Tensor, weights: Tensor, sites: Sequence[Site], loss: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        model, anatomy = self.model, Anatomy(self.model)
        if not self.remote:
            self.need_weights("taking gradients", ", or use a server that trusts you: steerlens.remote(model)")
            return gradients_at(anatomy, ids, mask, weights, sites, loss)
        # a session's block is plain code beside the weights, without a traced pass around it
        with model.session(backend=backend(model, self.remote, self.timeout_s)):
            found = nnsight.save(gradients_at(anatomy, ids, mask, weights, sites, loss))
        return found  # noqa: RET504 (bound by the session)

    def beside(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """As `Host.beside`, in a session's block on a server."""
        if not self.remote:
            return function(self, *arguments)
        model, anatomy = self.model, Anatomy(self.model)
        try:
            with model.session(backend=backend(model, self.remote, self.timeout_s)):
                found = nnsight.save(call_beside(anatomy, function, arguments))
        except RemoteError as error:
            if UNTRUSTED not in str(error):
                raise
            raise UntrustedError(
                f"this server {UNTRUSTED}, so nothing is linearised there; for lqr take solver='scalar', which needs "
                "forward passes only, or fit on local weights, save the controller and load it here"
            ) from None
        return found

    def tangents(self, tokens: Sequence[int], directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """As `Host.tangents`, in one trace."""
        if not self.remote:
            self.need_weights("linearising the blocks")
        model = self.model
        rows = 2 * sum(len(vectors) for vectors in directions.values())
        ids = torch.as_tensor(tokens, device=self.device)[None].expand(rows, -1)
        step = STEP if self.dtype.itemsize > 2 else WIDE_STEP
        probes: list[Probe] = []
        start = 0
        for t in sorted(directions):
            before, branch = self._entrances(t)
            probes.append(Probe(t, directions[t], start, before, branch, self.tap(Site(t, "resid_post"))))
            start += 2 * len(directions[t])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        where = backend(model, self.remote, self.timeout_s) if self.remote else None
        with torch.no_grad(), model.trace(inputs, backend=where):
            found = nnsight.save(differences(probes, step))
        return {t: value.cpu() for t, value in found.items()}

    def _entrances(self, t: int) -> tuple[Tap, Tap | None]:
        """Where the input of a block can be moved, and where the move must be added once more."""
        pre = Site(t, "resid_pre")
        if t > 0:
            return Plain(self.layers[t - 1], "output", pre), None
        if not self.away:
            return Plain(self.layers[0], "input", pre), None
        return self.tap(pre), self.tap(Site(0, "attn_out"))


class TracedAttachment(Attachment):
    """One edit on a model's root envoy."""

    def __init__(self, host: TracedHost, run: Pass, limits: Limits):
        self.run = run
        self._model = model = host.model
        self._forms: Any = None
        base, first, taps = host.base, host.entry, host.taps(run)
        apart = [host.tap(site) for site in run.aside.apart]
        try:
            steered = Steered.attach(model, self, host.wraps)
            carried, passes = steered.carried, Passes() if host.away else KnownPasses(steered)
            if isinstance(model, Remotable):
                self._forms = RemoteForms.enter(steered, model, run, limits)
            with model.edit(inplace=True):
                follow(base, first, taps, apart, run, carried, passes)
        except BaseException:
            self.detach()
            raise

    def _take_off(self) -> None:
        """This edit and no other."""
        self._model._edits = [edit for edit in self._model._edits if (edit.lcls or {}).get("run") is not self.run]
        steered = Steered.of(self._model)
        if steered is not None:
            if steered.forms is not None:
                steered.forms.leave(self.run)
            steered.leave(self)

    @property
    def payload_bytes(self) -> int | None:
        """Size of the latest request to a server."""
        return self._forms.payload_bytes if self._forms is not None else None
