"""What counts as a model. The libraries' classes are text: a library is imported by the user, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from nnsight import LanguageModel, TransformersModel
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    from steerlens.hosts.base import Host

#: A model that can be steered: TransformerLens's `TransformerBridge`, or `HookedTransformer` (TransformerLens 3);
#: nnsight's `LanguageModel` or `TransformersModel`; or the adapter to one of them, as `steerlens.remote` gives it.
Model: TypeAlias = "TransformerBridge | HookedTransformer | LanguageModel | TransformersModel | Host"
