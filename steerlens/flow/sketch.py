"""The tensor sketch of a polynomial kernel, the quadratic form that it equals, and its field for higher degrees."""

from __future__ import annotations

import torch
from torch import Tensor

from steerlens.flow.fields import Field


class TensorSketch:
    """Random features whose inner product is a polynomial kernel on average.

        <phi(u), phi(u')> ~ (gamma <u, u'> + coef0)^D
        phi(u) = irfft(prod_k rfft(S_k z)),   z = [sqrt(gamma) u, sqrt(coef0)]
        (S_k z)_i = sum_{j: h_k(j) = i} s_k(j) z_j

    The field of a classifier on the features has about `cos^2 = 1 / (1 + 1.2 d / n)` with that of the kernel itself: at
    d = 4096 and the paper's n = 8000 more than a third of its squared length is noise.

    Args:
        buckets: h, `[D d']`, integers below `components`; `d' = d + 1`, or d where `coef0` is 0.
        signs: s, `[D d']`, 1 or -1.
        components: n.
        gamma, coef0: Of the kernel.

    Source: Pham and Pagh 2013, as used by ODESteer (arXiv 2602.17560).
    """

    def __init__(self, buckets: Tensor, signs: Tensor, components: int, *, gamma: float, coef0: float):
        self.buckets = buckets.long()
        self.signs = signs.double()
        self.components = components
        self.gamma = gamma
        self.coef0 = coef0

    @classmethod
    def draw(
        cls, d: int, *, components: int = 8000, degree: int = 2, gamma: float = 0.1, coef0: float = 1.0, seed: int = 0
    ) -> TensorSketch:
        """A random sketch of vectors of length d; a seed gives the hashes that the authors' code draws after it."""
        generator = torch.Generator().manual_seed(seed)
        shape = (degree, d + (coef0 != 0))
        buckets = torch.randint(0, components, shape, generator=generator)
        bits = torch.randint(0, 2, shape, dtype=torch.int8, generator=generator)
        return cls(buckets, 2 * bits.double() - 1, components, gamma=gamma, coef0=coef0)

    def features(self, u: Tensor) -> Tensor:
        """phi, `[n d] -> [n components]`."""
        z = self.gamma**0.5 * u
        if self.coef0:
            z = torch.cat([z, z.new_full((len(z), 1), self.coef0**0.5)], dim=1)
        signs = self.signs.to(z.dtype)
        spectra = [_spectrum(z, *rows, self.components) for rows in zip(self.buckets, signs, strict=True)]
        return torch.fft.irfft(_product(spectra), self.components)

    def form(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The polynomial `<weights, phi(u)> = u'A u + <b, u> + k` of a sketch of degree 1 or 2: A, b, k.

        For degree 2 it is `z'M z` with `M_ij = s_1(i) s_2(j) w[(h_1(i) + h_2(j)) mod n]`, exactly.

        Raises:
            ValueError: a higher degree, which has no quadratic form.
        """
        degree, width = self.buckets.shape
        if degree > 2:
            raise ValueError(f"a sketch of degree {degree} is not a quadratic form; use degree 1 or 2")
        d, signs = width - (self.coef0 != 0), self.signs.to(weights.dtype)
        scale = torch.cat([weights.new_full((d,), self.gamma**0.5), weights.new_full((width - d,), self.coef0**0.5)])
        if degree == 1:
            row = scale * signs[0] * weights[self.buckets[0]]
            return weights.new_zeros(d, d), row[:d], row[d:].sum()
        M = weights[(self.buckets[0][:, None] + self.buckets[1][None, :]) % self.components]
        M = M * (scale * signs[0])[:, None] * (scale * signs[1])
        M = (M + M.T) / 2
        return M[:d, :d], 2 * M[:d, d:].sum(1), M[d:, d:].sum()


class Sketched(Field):
    """A logistic regression on a tensor sketch, of any degree.

        h(x) = <w, phi(z)> + k,   z = [sqrt(gamma) c, sqrt(coef0)],   c = x / |x|
        dh/dz_j = sum_k s_k(j) C_k[h_k(j)],   C_k = irfft(conj(prod_{l != k} rfft(S_l z)) rfft(w))

    Its random part has no small subspace, so that it is followed in all d coordinates, with Fourier transforms at each
    evaluation. It is meant for comparison with the authors' numbers, not for steering. Degrees 1 and 2 have
    `TensorSketch.form`.

    Args:
        sketch: Buckets h and signs s `[D d']`, the number of components n, and the kernel's constants.
        weights: w, `[n]`, in logits.
        constant: k, one number, in logits.
    """

    buckets: Tensor
    signs: Tensor
    components: int
    gamma: float
    coef0: float
    weights: Tensor
    constant: Tensor

    def __init__(self, sketch: TensorSketch, weights: Tensor, constant: Tensor):
        self.buckets = sketch.buckets
        self.signs = sketch.signs.to(weights.dtype)
        self.components = sketch.components
        self.gamma = sketch.gamma
        self.coef0 = sketch.coef0
        self.weights = weights
        self.constant = constant.reshape(1)
        self.basis = torch.eye(sketch.buckets.shape[1] - (sketch.coef0 != 0), dtype=weights.dtype)
        self.validate()

    def validate(self) -> None:
        """There is a weight for each component, and every bucket is a component."""
        if self.weights.shape != (self.components,) or self.buckets.is_floating_point():
            raise ValueError(
                f"weights has shape {list(self.weights.shape)}; the sketch has {self.components} components"
            )
        if not self.buckets.numel() or not 0 <= int(self.buckets.min()) <= int(self.buckets.max()) < self.components:
            raise ValueError(f"buckets must be whole numbers from 0 to {self.components - 1}")

    def spectra(self, c: Tensor) -> list[Tensor]:
        """`rfft(S_k z)` for each k, `[... d] -> [... n//2+1]`."""
        z = self.gamma**0.5 * c
        if self.coef0:
            z = torch.nn.functional.pad(z, (0, 1), value=self.coef0**0.5)
        return [
            _spectrum(z, bucket, sign, self.components) for bucket, sign in zip(self.buckets, self.signs, strict=True)
        ]

    def height(self, c: Tensor) -> Tensor:
        """`<w, phi(z)> + k`"""
        product = _product(self.spectra(c))
        return torch.fft.irfft(product, self.components) @ self.weights + self.constant[0]

    def ascent(self, c: Tensor) -> Tensor:
        """`sqrt(gamma) sum_k s_k C_k[h_k]`"""
        spectra, weights = self.spectra(c), torch.fft.rfft(self.weights)
        slope = torch.zeros_like(c)
        d = c.shape[-1]
        for index, (bucket, sign) in enumerate(zip(self.buckets, self.signs, strict=True)):
            others = spectra[:index] + spectra[index + 1 :]
            pulled = torch.fft.irfft(_product(others).conj() * weights if others else weights, self.components)
            slope = slope + sign[:d] * pulled[..., bucket[:d]]
        return self.gamma**0.5 * slope


def _spectrum(z: Tensor, bucket: Tensor, sign: Tensor, components: int) -> Tensor:
    """`rfft` of the signed counts of z, `[... d'] -> [... n//2+1]`."""
    counts = z.new_zeros(*z.shape[:-1], components).index_add(-1, bucket, z * sign)
    return torch.fft.rfft(counts)


def _product(spectra: list[Tensor]) -> Tensor:
    product = spectra[0]
    for spectrum in spectra[1:]:
        product = product * spectrum
    return product
