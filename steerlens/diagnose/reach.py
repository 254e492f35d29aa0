"""Was a feature's level reached, what did the linear model predict, and how much control did it take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from steerlens.core import Controller, Site, name_signals
from steerlens.core.types import Figure, Frame
from steerlens.diagnose.result import curves, frame
from steerlens.diagnose.rollout import check_followed, roll
from steerlens.fit.contrast import Text, tokenize
from steerlens.hosts import Nominal
from steerlens.hosts.types import Model
from steerlens.sae import Target
from steerlens.sae.feature import checked


@dataclass(frozen=True)
class Reach:
    """Activations of the features at the last token of some prompts, in units of the autoencoder.

    `[prompt feature]` or `[prompt]`, float64, on the CPU.

    Attributes:
        features: Indices of the features.
        at_least, at_most: The requested range, `[feature]`.
        before: Activations without control.
        predicted: Activations that a linear model of this prompt's blocks gives for the controls that acted.
        reached: Activations with control.
        energy: `sum_t |u_t|^2` up to the feature's layer, `[prompt]`, in squared units of the residual stream.
        least: The smallest energy with which the linear model reaches the range from the same sites, `[prompt]`.
        share: `sqrt(energy) / |x|`, x the unsteered state at the feature's site, `[prompt]`, no unit.
        bound: The highest activation that the linear model reaches with a control of the norm |x|, for each feature
            alone; a higher level is out of reach, whatever the gain.
    """

    features: tuple[int, ...]
    at_least: Tensor
    at_most: Tensor
    before: Tensor
    predicted: Tensor
    reached: Tensor
    energy: Tensor
    least: Tensor
    share: Tensor
    bound: Tensor

    @property
    def miss(self) -> Tensor:
        """Distance of the reached activation from the requested range, `[prompt feature]`."""
        return (self.at_least - self.reached).clamp(min=0) + (self.reached - self.at_most).clamp(min=0)

    def table(self) -> Frame:
        """One row a prompt and feature, a pandas DataFrame."""
        prompts, m = self.before.shape

        def of_prompts(value: Tensor) -> Tensor:
            return repeat(value, "prompt -> (prompt feature)", feature=m)

        def of_features(value: Tensor) -> Tensor:
            return repeat(value, "feature -> (prompt feature)", prompt=prompts)

        def of_both(value: Tensor) -> Tensor:
            return rearrange(value, "prompt feature -> (prompt feature)")

        columns = {
            "prompt": of_prompts(torch.arange(prompts)),
            "feature": list(self.features) * prompts,
            "at_least": of_features(self.at_least),
            "at_most": of_features(self.at_most),
            **{name: of_both(getattr(self, name)) for name in ("before", "predicted", "reached", "bound")},
            **{name: of_prompts(getattr(self, name)) for name in ("energy", "least", "share")},
        }
        return frame(columns, "prompt")

    def plot(self) -> Figure:
        """Requested, predicted and reached activations by prompt; lines are named by feature if there are several."""
        rows = range(len(self.before))
        lines, dashed = {}, []
        for index, name in enumerate(self.features):
            suffix = f" ({name})" if len(self.features) > 1 else ""
            low, high = self.at_least[index], self.at_most[index]
            asked = {"asked": low} if low == high else {"at least": low, "at most": high}
            for word, bound in asked.items():
                if torch.isfinite(bound) and not (word == "at least" and bound == 0):
                    lines[word + suffix] = (rows, bound.expand(len(rows)))
                    dashed.append(word + suffix)
            for word in ("before", "predicted", "reached"):
                lines[word + suffix] = (rows, getattr(self, word)[:, index])
        title = "Activation at the last token of each prompt"
        figure = curves(lines, title=title, x="prompt", y="activation (autoencoder's units)", dashed=dashed)
        return figure.update_xaxes(dtick=1)


def reach(
    model: Model,
    controller: Controller,
    target: Target,
    prompts: Sequence[Text],
    *,
    prepend_bos: bool | None = None,
) -> Reach:
    """Requested, predicted and reached activations of a feature, and the control that was needed.

        z_predicted = z(x_L) + sum_t Z_{t+1} u_t,   Z_{t+1} = W_enc A_L ... A_{t+1}
        least energy = need' (sum_t Z_{t+1} Z_{t+1}')^-1 need

    over the sites at which the controller acts, with the gradients Z of each prompt's own last token, and u_t as
    applied. Any controller on the residual stream can be tested, also one that was not made for the feature.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, with no controller attached.
        controller: Loops on the residual stream with `where="last"`.
        target: From `feature`, at a `resid_post`, without input normalisation.
        prompts: Strings, tuples, messages or token ids; the last token of each is measured.
        prepend_bos: As in `Pairs`.

    Raises:
        ValueError: loops that it cannot follow, no loop at or before the feature, a target it has no linear model for,
            an autoencoder that does not fit the model, no prompt.
    """
    host = checked("reach", model, target)
    check_followed(controller)
    if target.site.point != "resid_post" or target.setpoint.normalise != "none":
        raise ValueError(
            f"reach() needs an activation that is affine in the state, at a resid_post; this one is at {target.site}"
        )
    acting = [site for site in controller.sites if not target.site < site]
    if not acting:
        raise ValueError(f"the controller acts at {controller.sites}, all of it after the feature at {target.site}")
    if not prompts:
        raise ValueError("no prompts; give at least one")
    tokens = [tokenize(text, host, prepend_bos)[0] for text in prompts]
    if min(map(len, tokens)) < 2:
        raise ValueError("a prompt needs at least 2 tokens: the last one, and a context")
    rows = [_judge(host.nominal(ids), controller, target, acting, len(ids) - 1) for ids in tokens]
    stacked = [torch.stack([row[index] for row in rows]) for index in range(len(rows[0]))]
    at_least, at_most = (torch.tensor(side, dtype=torch.float64) for side in (target.at_least, target.at_most))
    return Reach(target.indices, at_least, at_most, *stacked)


def _judge(
    nominal: Nominal, controller: Controller, target: Target, acting: Sequence[Site], position: int
) -> tuple[Tensor, ...]:
    """The fields of `Reach` from `before` to `bound` for one prompt."""
    setpoint, last = target.setpoint, target.site.layer
    blocks = nominal.blocks[: last + 1]
    x = nominal.states[last + 1].detach().double().cpu()
    sensor = setpoint.sensor.double()
    z = sensor @ x + setpoint.bias.double()
    steered = roll(blocks, nominal.states[0], controller, position, nominal.states)
    reached = sensor @ steered.states[last + 1].double().cpu() + setpoint.bias.double()
    rows = _pulled(nominal, sensor, last, min(site.layer for site in acting))
    # of several loops at a site the total
    names = {site: (held.total or held.own[0])["u"] for site, held in name_signals(controller.loops).items()}
    predicted, gram, energy = z.clone(), torch.zeros(len(z), len(z)).double(), torch.zeros(()).double()
    for site in acting:
        u = steered.record[names[site]][0, 0].double().cpu()
        Z = rows[site.layer + (site.point == "resid_post")]
        predicted, gram, energy = predicted + Z @ u, gram + Z @ Z.T, energy + u.square().sum()
    need = torch.minimum(torch.maximum(z, setpoint.lower.double()), setpoint.upper.double()) - z
    norm = x.norm()
    bound = setpoint.activation(z + norm * gram.diagonal().sqrt())
    least = need @ torch.linalg.solve(gram, need)
    activations = (setpoint.activation(value) for value in (z, predicted, reached))
    return (*activations, energy, least, energy.sqrt() / norm, bound)


def _pulled(nominal: Nominal, sensor: Tensor, last: int, first: int) -> dict[int, Tensor]:
    """Gradients of the pre-activations with respect to the state before each block, and after the last one."""
    rows = {last + 1: sensor}
    for t in range(last, first - 1, -1):
        rows[t] = nominal.pull(t, rows[t + 1].to(nominal.states[t])).double().cpu()
    return rows
