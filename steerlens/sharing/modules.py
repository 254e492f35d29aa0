"""Module paths of a Hugging Face model, as other libraries name places, and our points."""

from __future__ import annotations

import re
from typing import Any

from steerlens.core import POINTS, Site
from steerlens.hosts.roles import Layout, skeleton, torch_model

#: A block's path: what other libraries call the list of blocks, and its number.
_BLOCK = re.compile(
    r"^(?P<blocks>(?:[A-Za-z_]\w*\.)*(?:layers|h|blocks|block))\.(?P<layer>\d{1,6})(?:\.(?P<rest>.+))?$"
)
#: Points whose value is a module's output, so that a hook on the module can change it.
OUTPUTS = ("resid_post", "attn_out", "mlp_out")


class Names:
    """The paths of one model's modules, relative to its base model, as `model.base_model.named_modules()` has them.

    Args:
        model: TransformerBridge, nnsight or Hugging Face model; None if it is not there. Whole blocks are then called
            `layers.5`, and the modules inside them cannot be named.
        what: What needs them, for the error.
    """

    def __init__(self, model: Any, what: str):
        self.what = what
        self.blocks = "layers"
        self.layout: Layout | None = None
        if model is not None:
            inner = torch_model(model)
            _, path, blocks, config = skeleton(inner)
            prefix = getattr(inner, "base_model_prefix", "")
            self.blocks = path.removeprefix(f"{prefix}.") if prefix else path
            self.layout = Layout(blocks[0], config)

    def path_of(self, site: Site) -> str:
        """The module whose output is the value at a site.

        Raises:
            ValueError: there is none, or the model is needed to name it.
        """
        if site.point == "resid_post":
            return f"{self.blocks}.{site.layer}"
        if site.point not in OUTPUTS:
            raise ValueError(f"{self.what} hooks a module's output, and {site} is not one; use {', '.join(OUTPUTS)}")
        layout = self._known(str(site))
        reason = layout.missing(site.point)
        if reason is not None:
            raise ValueError(f"no {site} in this model: block {site.layer} {reason}")
        return f"{self.blocks}.{site.layer}.{layout.paths[site.point][0]}"

    def site_of(self, path: str) -> Site:
        """The site at which a module's output is.

        Raises:
            ValueError: no block's path, or a module whose output is no point.
        """
        found = _BLOCK.match(path)
        if path.startswith("blocks.") and ".hook_" in path:
            return Site.parse(path)
        if found is None:
            raise ValueError(f"{path[:200]!r} is no block of a model, such as layers.5 or transformer.h.5")
        layer, rest = int(found["layer"]), found["rest"]
        if rest is None:
            return Site(layer)
        layout = self._known(repr(path[:200]))
        for point in OUTPUTS[1:]:
            if layout.paths.get(point) == (rest, "output"):
                return Site(layer, point)
        known = ", ".join(
            f"{point}: {layout.paths[point][0]}" for point in POINTS if point in OUTPUTS[1:] and point in layout.paths
        )
        raise ValueError(f"{path[:200]!r} is no point of this model; its modules are {known or 'whole blocks'}")

    def point_of_branch(self, name: str, last: str | None = None) -> str:
        """The point at the output of a block's own attention or MLP module, `"self_attn"` or `"mlp"`.

        Args:
            name: Of the branch.
            last: Name of the branch's last matrix, if the place is its output.

        Raises:
            ValueError: that output is not what is added to the residual stream, or the model is missing.
        """
        point = "mlp_out" if name == "mlp" else "attn_out"
        layout = self._known(self.what)
        path = layout.paths.get(point, ("", ""))[0]
        own = "mlp" if name == "mlp" else "attn|attention"
        # a branch whose output passes a norm before it is added has that norm as its point
        if not re.fullmatch(rf"\w*({own})\w*", path) or "norm" in path or layout.scale != 1:
            raise ValueError(
                f"{self.what}: in a {layout.kind} the output of its {name} module is no point of steerlens"
            )
        if last is not None and not layout.paths.get("mlp_post", ("", ""))[0].endswith(last):
            raise ValueError(f"{self.what}: a {layout.kind} has no {last} whose output is that of its MLP")
        return point

    def _known(self, place: str) -> Layout:
        if self.layout is None:
            raise ValueError(f"{place} is inside a block; give model=, so that {self.what} can be placed")
        return self.layout
