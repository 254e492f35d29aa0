"""How features are ranked: against finite differences through a plain hook, and with features that are always on."""

import pytest
import torch

import steerlens as sl
from steerlens.testing import Case

pytest.importorskip("sae_lens", reason="needs the extra sae")

from autoencoders import autoencoder


def preference(case, push):
    """Mean log probability per token of the positive less that of the negative texts, with a vector added."""
    block = case.model.blocks[2]

    def add(module, given, found):
        x = found[0] if isinstance(found, tuple) else found
        moved = torch.cat([x[:, :1], x[:, 1:] + push], 1)
        return (moved, *found[1:]) if isinstance(found, tuple) else moved

    sides = []
    for texts in (case.data.positive, case.data.negative):
        each = []
        for prompt, completion in texts:
            ids = torch.tensor([[*prompt, *completion]])
            handle = block.register_forward_hook(add)
            with torch.no_grad():
                found = case.logits(ids)[0, :-1].log_softmax(-1)
            handle.remove()
            each.append(found.gather(-1, ids[0, 1:, None]).mean())
        sides.append(torch.stack(each).mean())
    return float(sides[0] - sides[1])


def test_the_score_by_output_is_the_derivative_of_the_texts_log_probabilities():
    case, sae = Case("caa", "bridge", dtype=torch.float64), autoencoder()
    table = sl.sae.rank_features(case.model, sae, case.data)
    assert table["score"].abs().is_monotonic_decreasing
    for index in table.index[:3]:
        row = sae.W_dec[index].detach().double()
        # the model's norms round to float32, 1e-7 of the sum, and the quotient's own error grows as h squared
        h = 0.03
        slope = (preference(case, h * row) - preference(case, -h * row)) / (2 * h)
        at = table.loc[index]
        assert at.score == pytest.approx((at.positive - at.negative) * slope, rel=2e-3)


def test_by_sparse_a_feature_that_is_on_in_the_other_sides_texts_ranks_lower():
    case, sae = Case("caa", "bridge"), autoencoder()
    plain = sl.sae.rank_features(case.model, sae, case.data, by="effect")
    sparse = sl.sae.rank_features(case.model, sae, case.data, by="sparse")
    assert set(plain.index) == set(sparse.index)
    for index, row in sparse.iterrows():
        other = row.on_negative if row.effect > 0 else row.on_positive
        assert row.score == pytest.approx(row.effect * (1 - other))
        assert row.effect == pytest.approx(plain.loc[index].effect)
    assert (sparse.loc[(sparse.on_negative == 1) & (sparse.on_positive == 1), "score"] == 0).all()
    with pytest.raises(ValueError, match="by='size'"):
        sl.sae.rank_features(case.model, sae, case.data, by="size")


@pytest.mark.parametrize("host", ["hooked", "nnsight"])
def test_the_score_by_output_is_the_same_on_every_host(host):
    if host == "nnsight":
        pytest.importorskip("nnsight")
    sae = autoencoder()
    one, other = (Case("caa", name, dtype=torch.float64) for name in ("bridge", host))
    expected = sl.sae.rank_features(one.model, sae, one.data).score
    found = sl.sae.rank_features(other.model, sae, other.data).score
    assert found[expected.index].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
