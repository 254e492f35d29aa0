"""Names for what users pass and get, for annotations. Types of other libraries are text, so that none is imported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from steerlens.core.sites import Site
from steerlens.core.span import Span

if TYPE_CHECKING:
    import pandas
    import sae_lens
    import transformer_lens
    from plotly import graph_objects

#: Names of token positions, see `Loop`.
PositionName: TypeAlias = Literal["last", "last_prompt", "generated", "prompt", "all"]

#: Token positions: a name, a slice on absolute positions, a mask `[pos]` or `[batch pos]`, or a function from positions
#: `[batch pos]` to a mask of that shape, or a part of the text, see `Loop`.
Where: TypeAlias = PositionName | slice | Tensor | Span | Callable[[Tensor], Tensor]

#: What a run keeps of its signals: one number per token, everything, the signals of these names, or nothing.
RecordSpec: TypeAlias = Literal["scalars", "all"] | Collection[str] | None

#: Layers, counted from 0; negative ones count from the last. None: the method's own choice.
Layers: TypeAlias = int | Sequence[int] | Literal["all"] | None

#: A site, its hook name, or a layer for its `resid_post`.
Place: TypeAlias = Site | str | int

#: Real tokens of each row's prompt, BOS included; one number for all rows, or one for each.
PromptLengths: TypeAlias = int | Sequence[int] | Tensor

#: As `torch.Tensor.to` takes it.
Device: TypeAlias = torch.device | str | int | None

#: An object of JSON. Its values are numbers, strings, booleans, None, lists and objects; a recursive union of these
#: would have to be narrowed at each step of `recipe["arguments"]["layers"]`.
Json: TypeAlias = dict[str, Any]

#: What laws keep under keys of their own: whatever they put there.
Memory: TypeAlias = dict[str, Any]

#: A plotly figure.
Figure: TypeAlias = "graph_objects.Figure"

#: A pandas table.
Frame: TypeAlias = "pandas.DataFrame"

#: TransformerLens's cache.
Cache: TypeAlias = "transformer_lens.ActivationCache"

#: A sparse autoencoder of sae-lens.
Autoencoder: TypeAlias = "sae_lens.SAE"
