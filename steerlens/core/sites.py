"""Where in a model a loop senses or acts: a layer and a point, named as TransformerLens names it."""

from __future__ import annotations

#: Points of one block in the order of the forward pass.
POINTS = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")

_PREFIX = {"z": "attn.hook_", "mlp_post": "mlp.hook_"}
_SHORT = {"mlp_post": "post"}


class Site:
    """An address in the forward pass, `Site(5, "resid_post")`; `str()` is its TransformerLens hook name.

    Args:
        layer: Block index, 0-based.
        point: One of `POINTS`. State shapes: `[batch pos d]` for the residual stream and the two branch outputs,
            `[batch pos head d_head]` for `z` (query heads), `[batch pos neuron]` for `mlp_post`, which is the input of
            the MLP's output matrix (for a gated MLP: activation(gate) * up).

    Raises:
        TypeError: a layer that is not an integer (numpy's are integers, too).
        ValueError: a negative layer, or a point that is not in `POINTS`.

    Sites sort in the order of the forward pass.

    Attributes:
        order: Sort key, earlier in the forward pass is smaller; kept, because every token asks for it at every site.
    """

    __slots__ = ("layer", "order", "point")

    def __init__(self, layer: int, point: str = "resid_post"):
        if point not in POINTS:
            raise ValueError(f"no point {point!r}; a point is one of {', '.join(POINTS)}")
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layer={layer!r} is a {type(layer).__name__}; a layer is an integer, counted from 0")
        if layer < 0:
            raise ValueError(f"layer {layer} is negative; count blocks from 0")
        self.layer = int(layer)
        self.point = point
        self.order = self.layer, POINTS.index(point)

    @classmethod
    def of(cls, place: Site | str | int) -> Site:
        """A site, also from its hook name, or from a layer: the `resid_post` of that block.

        Raises:
            TypeError: none of these.
        """
        if isinstance(place, Site):
            return place
        if isinstance(place, str):
            return cls.parse(place)
        if isinstance(place, bool) or not hasattr(place, "__index__"):
            raise TypeError(
                f"{place!r} is no site; give Site(layer, point), a hook name as blocks.5.hook_resid_post, or a layer"
            )
        return cls(int(place))

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site of a hook name such as `blocks.5.hook_resid_post`."""
        head, _, tail = name.partition(".")
        layer, _, hook = tail.partition(".")
        for point in POINTS:
            if head == "blocks" and layer.isascii() and layer.isdigit() and hook == _hook(point):
                return cls(int(layer), point)
        raise ValueError(f"{name!r} names no site; write blocks.<layer>.hook_<point>, as blocks.5.hook_resid_post")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{_hook(self.point)}"

    def __repr__(self) -> str:
        return f"Site({self.layer}, {self.point!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.order == other.order

    def __hash__(self) -> int:
        return hash(self.order)

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order


def _hook(point: str) -> str:
    return f"{_PREFIX.get(point, 'hook_')}{_SHORT.get(point, point)}"
