"""What every method returns: loops and where they came from, as data that composes, scales, saves and loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from steerlens.core.hooks import Hook, forward_hooks
from steerlens.core.law import Loop, finite
from steerlens.core.part import Part, tensors_of
from steerlens.core.positions import check_where
from steerlens.core.sites import Site
from steerlens.core.types import Device, Json, Where


class Controller:
    """Feedback loops and their provenance. Data only: `steerlens.steer` attaches it to a model.

    `a + b` composes (loops at one site act in that order), `a * s` multiplies every control by `s` (`a * 0` steers
    nothing, bit for bit), `-a` and `a - b` reverse controls, `a.at(where)` moves it to other tokens, `a.only(layers)`
    keeps the loops of some layers. It can be iterated over, loop by loop.

    Attributes:
        loops: In the order of composition.
        recipe: Provenance as plain JSON: method, version, arguments, model fingerprint, hash of the data.
    """

    def __init__(self, loops: Iterable[Loop], recipe: Json | None = None):
        self.loops = tuple(loops)
        self.recipe = dict(recipe or {})
        for loop in self.loops:
            check_where(loop.where)
            for summary in loop.summaries:
                check_where(summary.where)

    def __add__(self, other: Controller) -> Controller:
        if not isinstance(other, Controller):
            return NotImplemented
        # what a controller's loops remember stays its own
        offset = self._groups
        moved = tuple(loop.replace(group=loop.group + offset) for loop in other.loops)
        recipe = {"method": "+", "parts": [self.recipe, other.recipe], "groups": [offset, other._groups]}
        return Controller(self.loops + moved, recipe)

    def __mul__(self, factor: float) -> Controller:
        by = finite("factor", factor)
        return self._each(lambda loop: loop.replace(strength=loop.strength * by))

    __rmul__ = __mul__

    def __neg__(self) -> Controller:
        return self * -1.0

    def __sub__(self, other: Controller) -> Controller:
        return self + -other if isinstance(other, Controller) else NotImplemented

    def __iter__(self) -> Iterator[Loop]:
        return iter(self.loops)

    def __len__(self) -> int:
        return len(self.loops)

    def at(self, where: Where) -> Controller:
        """The same loops at other token positions; the forms of `where` are those of `Loop`."""
        check_where(where)
        return self._each(lambda loop: loop.replace(where=where))

    def only(self, layers: Iterable[int]) -> Controller:
        """The loops that act at the given layers."""
        kept = set(layers)
        missing = kept - {site.layer for site in self.sites}
        if missing:
            raise ValueError(f"no loop acts at layers {sorted(missing)}; this controller acts at {self.layers}")
        return Controller([loop for loop in self.loops if loop.act.layer in kept], self.recipe)

    def retuned(self, **arguments: float | bool | str | Sequence[float] | Tensor | None) -> Controller:
        """The same fit with other values of arguments that do not enter it: a level, an angle, a gain, a strength.

            controller = sl.lqr(model, pairs)
            gentler = controller.retuned(level=0.8)     # equal to sl.lqr(model, pairs, level=0.8)

        No model is needed and nothing is read again. Which arguments a method can change is in its docstring; all
        change `strength`. Factors, positions, gates and schedules that were added since the fit are kept. In a sum it
        changes the summands that can change the argument. The recipe holds the new values, and under `retuned` those
        of the fit.

        Args:
            arguments: Of the method, by name.

        Raises:
            ValueError: an argument that needs a refit, or that the method does not have; the message names those that
                can be changed. Otherwise as the method itself.
        """
        from steerlens.core.tables import VIEWS  # not at the top: this module travels, and methods do not

        found: Controller = VIEWS["retune"](self, arguments)
        return found

    def to(self, device: Device = None, dtype: torch.dtype | None = None) -> Controller:
        """The same loops with their tensors on another device or, for floating ones, in another dtype."""

        moved: dict[int, Tensor] = {}  # loops share a direction of the size of the model

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            return moved[id(tensor)]

        return self._each(lambda loop: loop.change(move))

    def fwd_hooks(self) -> list[tuple[str, Hook]]:
        """The controller as hooks of TransformerLens: `model.run_with_hooks(tokens, fwd_hooks=controller.fwd_hooks())`.

        Equal to `steer` for one forward pass over whole texts: every row begins at its first column and has no pads,
        there is no KV cache, and nothing is recorded. `"last"` then is the last column. For everything else, `generate`
        and batches with padding among it, use `steer`.

        Raises:
            ValueError: a loop acts at `resid_mid`, or has a gate on the prompt, a summary, a tangent or a reference;
                hooks cannot serve it.
        """
        return forward_hooks(self.loops)

    @property
    def sites(self) -> list[Site]:
        """Where it acts, in the order of the forward pass."""
        return sorted({loop.act for loop in self.loops})

    @property
    def layers(self) -> list[int]:
        """Layers where it acts."""
        return sorted({site.layer for site in self.sites})

    @property
    def fingerprints(self) -> list[tuple[str, Json]]:
        """The method and the model fingerprint of each summand that was fitted on a model."""
        return _fingerprints(self.recipe)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        tensors = {id(tensor): tensor for tensor in tensors_of([loop.parts for loop in self.loops])}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def __repr__(self) -> str:
        # one of your own has no recipe
        method = f"{self.recipe['method']}: " if "method" in self.recipe else ""
        size = f"{self.nbytes} B" if self.nbytes < 1000 else f"{self.nbytes / 1e3:.0f} kB"
        loops = f"{len(self)} loop{'s' * (len(self) != 1)} at layer{'s' * (len(self.layers) != 1)}"
        return f"Controller({method}{loops} {_ranges(self.layers)}, {size})"

    def _repr_html_(self) -> str:
        from steerlens.core.tables import VIEWS  # as for files: only the user's side needs it

        return VIEWS["controller"](self)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file: tensors, and everything else as JSON in its header.

        An older file of this name is replaced when the new one is complete.

        Raises:
            OSError: it cannot be written there; an older file is then untouched.
            TypeError: a loop's `where` is a callable, which a file cannot hold; use a slice or a mask.
            ValueError: a part holds an attribute that its class does not declare, or of another type, see `Part`.
        """
        from steerlens.core.files import write_controller  # not at the top: this module travels, and files do not

        write_controller(path, self.loops, self.recipe)

    @classmethod
    def load(cls, path: str | Path, *, laws: Iterable[type[Part]] = ()) -> Controller:
        """Read a file written by `save`, also by one of format 2.

        Nothing in it is executed and no module is imported for it: classes are looked up by name among the parts of
        steerlens and `laws`, attributes are checked against what their class declares, and a digest of header and
        tensors must match. The digest shows damage; it does not show who wrote the file.

        Args:
            laws: Your own law and setpoint classes that the file may name; those of steerlens are known.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: anything else: no controller file, a damaged one, one that names a class which is neither in
                steerlens nor in `laws`, or holds values that the class does not allow.
        """
        from steerlens.core.files import read_controller

        return cls(*read_controller(path, laws))

    def push_to_hub(
        self,
        repo: str,
        *,
        file: str = "controller.safetensors",
        private: bool | None = None,
        license: str | None = None,
        data_license: str | None = None,
        evaluation: object = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put it on the Hugging Face Hub: its file, and a page made from its recipe.

        Needs the extra `hub`. The page names the method, its arguments, the data's hash, the model's fingerprint, the
        hook points and tokens, and whom to cite. The repository is made if there is none.

        Args:
            repo: `user/name`.
            file: Name of its file there, in `.safetensors`.
            private: Whether a new repository is private; default as your account has it.
            license: Of the controller, as the Hub abbreviates it, such as `"mit"`.
            data_license: Of the data that it was fitted on, for the page.
            evaluation: For the page: what `steerlens.compare` returned, or Markdown.
            message: Of the commit.
            token: Of the Hub; default the one of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: it cannot be written there; a ConnectionError if the Hub does not answer, a PermissionError without
                a token that may write.
            ValueError: not a name of a repository.
            TypeError, ValueError: as `save`.
        """
        from steerlens.core.tables import VIEWS  # not at the top: this module travels, and the Hub does not

        options = {"private": private, "license": license, "data_license": data_license, "evaluation": evaluation}
        url: str = VIEWS["push"](self, repo, file=file, message=message, token=token, **options)
        return url

    @classmethod
    def from_hub(
        cls,
        repo: str,
        *,
        revision: str | None = None,
        file: str = "controller.safetensors",
        laws: Iterable[type[Part]] = (),
        token: str | None = None,
    ) -> Controller:
        """Read a controller from the Hugging Face Hub, or from the cache if it is there.

        Needs the extra `hub`. The file is checked as by `load`: nothing in it is executed.

        Args:
            repo: `user/name`.
            revision: Branch, tag or commit; default the main branch. Only a whole commit hash names the same file for
                ever.
            file: Name of its file there.
            laws: As for `load`.
            token: Of the Hub, for a private repository; default the one of `hf auth login`.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: it cannot be read; a FileNotFoundError if there is no such repository, revision or file, a
                ConnectionError if the Hub does not answer and the cache lacks it, a PermissionError if conditions
                are to be accepted.
            ValueError: not a name of a repository, or the file is refused as by `load`.
        """
        from steerlens.core.tables import VIEWS

        found: Controller = VIEWS["pull"](repo, revision=revision, file=file, laws=laws, token=token)
        return found

    @property
    def _groups(self) -> int:
        """How many groups its loops can have, those of loops that `only` left out included."""
        return max([sum(self.recipe.get("groups", ())), *(loop.group + 1 for loop in self.loops)], default=0)

    def _each(self, change: Callable[[Loop], Loop]) -> Controller:
        return Controller([change(loop) for loop in self.loops], self.recipe)


def _ranges(layers: list[int]) -> str:
    if layers and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ", ".join(map(str, layers)) or "none"


def _fingerprints(recipe: Json) -> list[tuple[str, Json]]:
    own = [(str(recipe.get("method", "controller")), recipe["model"])] if recipe.get("model") else []
    return own + [found for part in recipe.get("parts", ()) for found in _fingerprints(part)]
