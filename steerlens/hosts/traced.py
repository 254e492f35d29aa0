"""nnsight: edits that steer every trace and every generation, here or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import nnsight
import torch
from nnsight.intervention.envoy import Envoy
from nnsight.modeling.mixins.remotable import Remotable
from torch import Tensor, nn

from steerlens.core import POINTS, Pass, Site
from steerlens.hosts import hf
from steerlens.hosts.base import Attachment, Host, pool
from steerlens.hosts.companion import Spot
from steerlens.hosts.edit import StoodDown, Tap, follow, spots_of
from steerlens.hosts.families import family_paths, layers_path
from steerlens.hosts.graph import Place
from steerlens.hosts.learning import Learner
from steerlens.hosts.nominal import Nominal
from steerlens.hosts.remote import RemoteForms

#: One dict for all edits of a model, see `Tap.visit`.
_CARRIED: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()


def claim(model: Any) -> Host | None:
    """A host for an nnsight model, or None."""
    return TracedHost(model) if isinstance(model, Envoy) else None


class TracedHost(Host):
    """An nnsight `TransformersModel` or `LanguageModel` of the Llama, Gemma or GPT-2 families."""

    library = "nnsight"

    def __init__(self, model: Any, remote: bool | str = False):
        self.model = model
        self.remote = remote
        module = model._module
        config = getattr(module, "config", None)
        if config is None or getattr(module, "base_model", module) is module:
            kind = type(module).__name__
            raise TypeError(f"{kind} is no Hugging Face language model with a head; wrap one with TransformersModel")
        config = config.get_text_config()
        self.n_layers = config.num_hidden_layers
        self.d_model = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.d_head = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.d_model
        self.d_vocab = config.vocab_size
        self.base = getattr(model, module.base_model_prefix)
        self.layers = getattr(self.base, layers_path(self.base._module))
        self.paths = family_paths(self.layers[0]._module)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer does it by itself."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    @property
    def _weight(self) -> Tensor:
        return next(self.layers[0]._module.parameters())

    @property
    def device(self) -> torch.device:
        """Where the first block's weights are; the CPU while they are on a server only."""
        return torch.device("cpu") if self.away else self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's weights."""
        return self._weight.dtype

    def points(self) -> Sequence[str]:
        """All of them, in every family that is known."""
        return POINTS

    def attach(self, run: Pass, *, payload_limit: int) -> Attachment:
        """An edit on the model's root: it also steers `generate`, sessions and remote runs."""
        first = self._tap(Site(0, "resid_pre")).envoy if self.away else None
        apart = [self._tap(site) for site in run.aside.apart]
        return TracedAttachment(self.model, self.base, first, self.taps(run), apart, run, payload_limit)

    def nominal(self, tokens: Sequence[int]) -> Nominal:
        """The unsteered path of the last token."""
        self._need_weights("linearising the blocks")
        module = self.model._module
        return hf.nominal(module, [layer._module for layer in self.layers], tokens)

    def logits(self, ids: Tensor) -> Tensor:
        """Through a trace, which runs the edits; `_logits` calls the module below them."""
        self._need_weights("running the model")
        ids = ids.to(self.device)
        with self.model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            logits = self.model.output.logits.save()
        return logits  # noqa: RET504 (bound by the trace)

    def _out_weight(self, layer: int) -> Tensor | None:
        return getattr(self.layers[layer]._module.get_submodule(self.paths["mlp_post"][0]), "weight", None)

    def learner(self) -> Learner:
        """The Hugging Face model inside."""
        self._need_weights("differentiating the parameters")
        return Learner(self.model._module, lambda: StoodDown(self.base), self._spots)

    def _spots(self, sites: Sequence[Site]) -> dict[Site, Spot]:
        return spots_of([self._tap(site) for site in sites])

    def output_matrix(self, layer: int) -> Tensor:
        """Of attention, `[head d_head d]`."""
        self._need_weights("taking attention apart")
        module = self.layers[layer]._module.get_submodule(self.paths["z"][0])
        # a Linear keeps [out in], GPT-2's Conv1D [in out]
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
        return weight.detach().unflatten(0, (self.n_heads, -1))

    @property
    def away(self) -> bool:
        """Whether the weights are on a server only."""
        return self._weight.device.type == "meta"

    def taps(self, run: Pass) -> list[Tap]:
        """What the edit must visit, in the order of the forward pass."""
        taps = []
        for site in run.sites:
            pre, branch = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
            if site.point == "resid_mid" and site in run.names:
                taps += [self._tap(pre, Tap.BEFORE), self._tap(branch, Tap.MID, site)]
            elif site.point == "resid_pre" and site in run.names:
                taps += [self._tap(pre, Tap.ENTER, site), self._tap(branch, Tap.CARRY)]
            else:
                taps.append(self._tap(site, Tap.PLAIN, site))
        return sorted(taps, key=lambda tap: tap.order)

    def _tap(self, read: Site, role: int = Tap.PLAIN, steers: Site | None = None) -> Tap:
        path, side = self.paths[read.point]
        envoy = self.layers[read.layer]
        for name in path.split(".") if path else ():
            envoy = getattr(envoy, name)
        return Tap(envoy, side, read, role, steers, self.n_heads if read.point == "z" else 0)

    def _read(self, ids: Tensor, mask: Tensor, weights: Tensor, sites: Sequence[Site]) -> list[Tensor]:
        if not self.remote:
            self._need_weights("reading activations", ", or read on a server with steerlens.remote(model)")
        taps = [self._tap(site) for site in sites]
        model = self.model
        # stopping before the unembedding would cut off edits of the user's at later layers
        early = not model._edits
        where = {"remote": self.remote} if self.remote else {}
        with torch.no_grad(), model.trace({"input_ids": ids, "attention_mask": mask}, **where) as tracer:
            found = nnsight.save([pool(tap.value(), weights) for tap in taps])
            if early:
                tracer.stop()
        return [value.cpu() for value in found]

    def _places(self, sites: Sequence[Site]) -> tuple[nn.Module, list[Place]]:
        self._need_weights("taking gradients")
        blocks = [layer._module for layer in self.layers]
        places = [(self.paths[site.point], blocks[site.layer]) for site in sites]
        return blocks[0], [(block.get_submodule(path), side) for (path, side), block in places]

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model._module(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def _need_weights(self, what: str, instead: str = "") -> None:
        if self.away:
            raise NotImplementedError(f"{what} needs the weights here: build the model with dispatch=True{instead}")


class TracedAttachment(Attachment):
    """One edit on a model's root envoy."""

    def __init__(
        self, model: Any, base: Any, first: Any, taps: list[Tap], apart: list[Tap], run: Pass, payload_limit: int
    ):
        self._model = model
        self._run = run
        self._forms = RemoteForms.enter(model, run, payload_limit) if isinstance(model, Remotable) else None
        carried = _CARRIED.setdefault(model, {})
        with model.edit(inplace=True):
            follow(base, first, taps, apart, run, carried)
        self._edit = model._edits[-1]

    def detach(self) -> None:
        """Remove this edit and no other."""
        self._model._edits = [edit for edit in self._model._edits if edit is not self._edit]
        if self._forms is not None:
            self._forms.leave(self._run)

    @property
    def payload_bytes(self) -> int | None:
        """Size of the latest request to a server."""
        return None if self._forms is None else self._forms.payload_bytes
