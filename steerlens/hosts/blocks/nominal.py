"""The plant of a control law: each block as a function of the last token, everything before it held fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from steerlens.hosts.blocks.attention import PlainAttention
from steerlens.hosts.blocks.context import FixedContext
from steerlens.hosts.blocks.readout import Readout
from steerlens.hosts.blocks.turns import turn_of

#: Floats that gradients may take together in a narrow model, 8 MB.
SMALL = 1 << 21
#: Gradients at a time, on a CPU and elsewhere.
MOST = (300, 1024)


class Nominal:
    """The last token's unsteered path `x[0] ... x[T]` and the blocks `x[t+1] = f_t(x[t])` around it.

    Each block sees the other tokens through their keys and values, which do not change. By causality the product of
    these Jacobians is the Jacobian of the whole model for the last token.

    Args:
        blocks: `f_t`, each `[n d] -> [n d]`.
        states: `x[t]`, `[d]` each, one more than there are blocks.
        room: Most floats that a gradient needs at once on its way back through a block; it decides how many go
            together.
        turn: Held while a block runs, see `turn_of`.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[Tensor], Tensor]],
        states: Sequence[Tensor],
        *,
        room: int = 1,
        turn: Any = None,
    ):
        self._turn = nullcontext() if turn is None else turn
        self.blocks = list(blocks)
        self.states = list(states)
        self.room = room
        self._last_map = 0

    def jacobian(self, t: int) -> Tensor:
        """`A_t = d f_t / d x` at `x[t]`, `[d d]` with `A[i, j] = d out_i / d in_j`, in the model's dtype.

        Exact, by reverse mode through one token: `d` cotangents, some at a time.
        """
        x = self.states[t]
        A = torch.zeros(x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
        self.add_jacobian(t, A)
        return A

    def add_jacobian(self, t: int, total: Tensor) -> None:
        """Adds `A_t` to a matrix `[d d]`, some rows at a time, so that no second one exists.

        Beside the matrix it needs `2 d^2` floats, or 8 MB where that is more.
        """
        with _differentiable():
            x, y, readout = self._replay_open(t)
            d = x.shape[-1]
            chunk = self._chunk(d)
            for start in range(0, d, chunk):
                size = min(chunk, d - start)
                cotangents = torch.zeros(size, d, dtype=y.dtype, device=y.device)
                cotangents.diagonal(start).fill_(1)
                if readout is None or readout.hidden is None:
                    total[start : start + size] += _pull(y, x, cotangents)
                else:
                    hidden = readout.hidden
                    through = readout.weight[start : start + size].view(size, *hidden.shape)
                    total[start : start + size] += _pull_all((y, hidden), x, (cotangents[:, None], through))

    def pull(self, t: int, rows: Tensor) -> Tensor:
        """Gradients through one block: `rows @ A_t` without A_t, `[k d] -> [k d]`, in the model's dtype.

        Pulled back block by block, a direction v of the state before block s becomes the gradient of its feature with
        respect to the state before each earlier block t: `d <v, x_s> / d x_t = A_t' ... A_{s-1}' v`.
        """
        with _differentiable():
            x, y = self._replay(t)
            return torch.cat([_pull(y, x, part.to(y)) for part in rows.split(self._chunk(len(rows)))])

    def push(self, t: int, rows: Tensor) -> Tensor:
        """Tangents through one block: `rows @ A_t'` without A_t, `[k d] -> [k d]`, in the model's dtype.

        By differentiating the gradient, which is linear in its cotangent, so that a block needs no forward-mode
        formulas.
        """
        with _differentiable():
            x, y = self._replay(t)
            cotangent = torch.zeros_like(y, requires_grad=True)
            (gradient,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            return torch.cat([_pull(gradient, cotangent, part.to(y)) for part in rows.split(self._chunk(len(rows)))])

    def _chunk(self, rows: int) -> int:
        """How many gradients to take at once, so that all take equal parts."""
        d = self.states[0].shape[-1]
        most = min(MOST[self.states[0].device.type != "cpu"], max(2 * d * d, SMALL) // self.room)
        parts = -(-rows // max(1, most))
        return max(1, -(-rows // max(1, parts)))

    def _replay(self, t: int) -> tuple[Tensor, Tensor]:
        """A block's input and output, `[1 d]` each, with the graph between them."""
        x = self.states[t].detach().clone()[None].requires_grad_()
        with self._turn, FixedContext():
            return x, self.blocks[t](x)

    def _replay_open(self, t: int) -> tuple[Tensor, Tensor, Readout | None]:
        """As `_replay`, with the block's last linear map taken out of the graph where y is its output plus the rest."""
        while True:
            with Readout(self._last_map) as readout:
                x, y = self._replay(t)
            if readout.count in (0, self._last_map + 1):
                break
            self._last_map = readout.count - 1
        return (x, y, readout) if readout.adds_to(y) else (*self._replay(t), None)


def _differentiable() -> ExitStack:
    """Gradients on, and attention in plain operations, whose gradient can be batched and differentiated again."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(PlainAttention())
    return stack


def _pull(y: Tensor, x: Tensor, cotangents: Tensor) -> Tensor:
    """`[k d] -> [k d]` through a graph from x to y, `[1 d]` each, which stays usable."""
    return _pull_all((y,), x, (cotangents[:, None],))


def _pull_all(outputs: tuple[Tensor, ...], x: Tensor, cotangents: tuple[Tensor, ...]) -> Tensor:
    """The sum over several outputs, each with k cotangents of its own shape."""

    def gradient(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.autograd.grad(outputs, x, parts, retain_graph=True)[0]

    return torch.func.vmap(gradient)(cotangents)[:, 0].detach()


class Capture:
    """Records the arguments of every block during a forward pass, and calls the blocks again with another state.

    Args:
        blocks: The model's blocks, in order.
        carried: Number of tokens whose keys get a gradient: one, or all where `FixedContext` cannot follow attention.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, carried: int = 1):
        self.modules = list(blocks)
        self.carried = carried
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> Capture:
        self._thread = get_ident()
        self._handles = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in self.modules]
        self._handles.append(self.modules[-1].register_forward_hook(self._finish))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == self._thread:  # another thread may run the same model meanwhile
            self.calls.append((args, dict(kwargs)))

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == self._thread:
            self.final = first(output)

    def nominal(self, freeze: Callable[[int, Any], Any]) -> Nominal:
        """The captured pass over one token as a `Nominal`.

        Args:
            freeze: Given the layer and one argument of its block, returns what to pass instead: a cache that does not
                grow for the cache, or a `Thaw`; anything else unchanged.
        """
        if len(self.calls) != len(self.modules):
            raise RuntimeError(f"the model ran {len(self.calls)} of its {len(self.modules)} blocks in one pass")
        blocks = [self._block(layer, freeze) for layer in range(len(self.modules))]
        states = self.states()
        room = self._room(states[0].shape[-1])
        return Nominal(blocks, states, room=room, turn=turn_of(self.modules[0]))

    def states(self) -> list[Tensor]:
        """The last token's state before each block and after the last, `[d]` each."""
        return [*(state_of(args, kwargs).detach()[0, -1] for args, kwargs in self.calls), self.final.detach()[0, -1]]

    def _room(self, d: int) -> int:
        """Floats of a gradient in the MLP or in attention, measured on the families' eager attention."""
        widest = max(max(weight.shape) for weight in self.modules[0].parameters() if weight.ndim)
        # quantised weights have odd shapes, and no MLP is wider
        return 3 * d + max(6 * min(widest, 8 * d), 3 * (self.carried + 1) * d)

    def _block(self, layer: int, freeze: Callable[[int, Any], Any]) -> Callable[[Tensor], Tensor]:
        module = self.modules[layer]
        args, kwargs = self.calls[layer]
        args = tuple(freeze(layer, value) for value in args)
        kwargs = {name: freeze(layer, value) for name, value in kwargs.items()}

        def block(x: Tensor) -> Tensor:
            state = x[:, None]
            given = [value.make() if isinstance(value, Thaw) else value for value in args]
            named = {name: value.make() if isinstance(value, Thaw) else value for name, value in kwargs.items()}
            if "hidden_states" in named:
                return first(module(*given, **{**named, "hidden_states": state}))[:, 0]
            return first(module(state, *given[1:], **named))[:, 0]

        return block


class Thaw:
    """Stands for an argument that a block changes, and gets anew at each call.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], Any]):
        self.make = make


def first(output: Any) -> Tensor:
    """The tensor of a module's output, which is a tuple in some families and releases."""
    return output if isinstance(output, Tensor) else output[0]


def state_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The state among a module's arguments: by name in some families, else the first."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
