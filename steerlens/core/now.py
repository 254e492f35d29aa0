"""What a law is given in addition to the state: memories with a lifetime, and what its loop asked for."""

from __future__ import annotations

from torch import Tensor

from steerlens.core.types import Memory


class Now:
    """The moment at which a law acts.

    A law reads what it needs and may keep values of its own under keys of its own in `layers` and `sequence`.

    Attributes:
        layers: Lives for one forward pass; shared by the loops of one group, which act layer after layer.
        sequence: Lives until the sequence ends; shared by the loops of one group.
        summary: The prompt's pooled state, `[batch ...]`, if the loop declares one.
        tangent: How the unsteered state changes along a direction of the parameters, `[batch pos ...]`, if declared.
    """

    __slots__ = ("_reference", "_summary", "_tangent", "layers", "sequence")

    def __init__(
        self,
        layers: Memory | None = None,
        sequence: Memory | None = None,
        *,
        summary: Tensor | None = None,
        tangent: Tensor | None = None,
        reference: Tensor | None = None,
    ):
        self.layers: Memory = {} if layers is None else layers
        self.sequence: Memory = {} if sequence is None else sequence
        self._summary = summary
        self._tangent = tangent
        self._reference = reference

    def of_row(self, row: int, columns: Tensor, layers: Memory, sequence: Memory) -> Now:
        """The same for one row of the batch and some of its tokens, with memories of its own."""
        given = (self._summary, self._tangent, self._reference)
        summary, tangent, reference = (None if value is None else value[row : row + 1] for value in given)
        return Now(
            layers,
            sequence,
            summary=summary,
            tangent=None if tangent is None else tangent[:, columns],
            reference=None if reference is None else reference[:, columns],
        )

    @property
    def summary(self) -> Tensor:
        """The prompt's pooled state, `[batch ...]`, in the law's dtype; the loop declares which one.

        Raises:
            LookupError: the loop declares none.
        """
        if self._summary is None:
            raise LookupError(
                "now.summary was asked for, but the loop declares none; give Loop(..., summary=Summary(site))"
            )
        return self._summary

    @property
    def tangent(self) -> Tensor:
        """How the unsteered state at the acting site changes along a direction of the parameters, `[batch pos ...]`.

        Raises:
            LookupError: the loop declares no direction.
        """
        if self._tangent is None:
            raise LookupError(
                "now.tangent was asked for, but the loop declares none; give Loop(..., tangent=Direction(...))"
            )
        return self._tangent

    @property
    def reference(self) -> Tensor:
        """The unsteered state of the same tokens at the site that the loop names, `[batch pos ...]`.

        Raises:
            LookupError: the loop names none.
        """
        if self._reference is None:
            raise LookupError(
                "now.reference was asked for, but the loop names no site of it; give Loop(..., reference=site)"
            )
        return self._reference
