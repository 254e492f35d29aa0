"""Features as setpoints: against sae-lens's own encoders, on every host, and on the autoencoder that is shipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import DATA

import steerlens as sl
from steerlens.control.linearization import Linearization
from steerlens.core import Now, Site
from steerlens.diagnose import reach
from steerlens.models import smollm2_sae, tiny
from steerlens.testing import Case

sae_lens = pytest.importorskip("sae_lens")
from autoencoders import ARCHITECTURES, HOOK, IDS, TEXTS, autoencoder  # noqa: E402


def states(count=300, d=32):
    return 3 * torch.randn(count, d, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_sensor_reads_what_the_autoencoder_encodes(kind):
    name, options = ARCHITECTURES[kind]
    sae, x = autoencoder(name, **options), states()
    setpoint = sl.sae.feature(sae, [3, 7], at_least=0).setpoint
    expected = sae.encode(x)[:, [3, 7]].detach()
    assert (expected > 0).any()
    assert (expected == 0).any()
    torch.testing.assert_close(setpoint.activation(setpoint.preactivation(x)), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("along", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_step_reaches_the_level_of_overlapping_features(kind, along):
    name, options = ARCHITECTURES[kind]
    sae, x = autoencoder(name, **options), states()
    # an autoencoder that normalises its input cannot read more than sqrt(d) |w| + b
    level = [0.9, 1.2] if "norm" in kind else [9.0, 5.0]
    setpoint = sl.sae.feature(sae, [3, 7], level=level, along=along).setpoint
    reached = sae.encode(x + setpoint.error(x))[:, [3, 7]].detach()
    torch.testing.assert_close(reached, torch.tensor(level).expand_as(reached), atol=1e-4, rtol=1e-4)


def test_topk_holds_the_preactivation_where_other_features_are_larger():
    sae, x = autoencoder("TopKSAE", k=3), states()
    setpoint = sl.sae.feature(sae, 5, level=2.0).setpoint
    read = sae.encode(x + setpoint.error(x))[:, 5].detach()
    assert (read == 0).any()
    torch.testing.assert_close(read[read > 0], torch.full_like(read[read > 0], 2.0), atol=1e-4, rtol=0)


def test_a_range_asks_for_nothing_inside_it_and_for_its_edge_outside():
    sae, x = autoencoder(), states()
    setpoint = sl.sae.feature(sae, 3, at_least=2.0, at_most=6.0).setpoint
    before, after = (sae.encode(state)[:, 3].detach() for state in (x, x + setpoint.error(x)))
    inside = (before >= 2) & (before <= 6)
    assert inside.any()
    assert (setpoint.error(x)[inside] == 0).all()
    torch.testing.assert_close(after, before.clamp(2.0, 6.0), atol=1e-4, rtol=0)


def test_level_zero_and_at_most_turn_a_feature_off_and_leave_it_alone_where_it_is_off():
    sae, x = autoencoder(), states()
    for target in (sl.sae.feature(sae, 3, level=0), sl.sae.feature(sae, 3, at_most=0)):
        e = target.setpoint.error(x)
        off = sae.encode(x)[:, 3] <= target.setpoint.threshold * 0.99
        assert (sae.encode(x + e)[:, 3] == 0).all()
        assert (e[off & (target.setpoint.preactivation(x)[:, 0] < 0)] == 0).all()


def test_what_lies_off_the_features_directions_is_kept_the_autoencoders_error_included():
    """u = c d: x, and so what the autoencoder leaves unexplained, changes along d alone."""
    sae, x = autoencoder(), states()
    target = sl.sae.feature(sae, [3, 7], level=[9.0, 5.0])
    moved = x + target.setpoint.error(x)
    frame = torch.linalg.qr(target.setpoint.basis.T).Q
    off = torch.eye(32) - frame @ frame.T
    torch.testing.assert_close(moved @ off, x @ off, atol=1e-5, rtol=0)
    # where no other feature changes its reading, the reconstruction moves along d too, and with it the error
    quiet = autoencoder(size=3)
    with torch.no_grad():
        quiet.W_dec.copy_(torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(2))).Q.T)
        quiet.W_enc.copy_(quiet.W_dec.T)
        quiet.b_dec.zero_()
    moved = x + sl.sae.feature(quiet, 1, level=4.0).setpoint.error(x)
    already = quiet.encode(x)[:, 1] > 0
    errors = [state - quiet.decode(quiet.encode(state)) for state in (x, moved)]
    torch.testing.assert_close(errors[0][already], errors[1][already], atol=1e-5, rtol=0)


def test_a_held_feature_reads_its_level_on_every_host(host):
    case = Case("caa", host)
    target = sl.sae.feature(autoencoder(), [3, 7], level=[4.0, 2.0])
    controller = sl.sae.hold(case.model, target, where="all") + sl.sae.observe(case.model, target)
    with sl.steer(case.model, controller) as run:
        steered = case.logits(torch.tensor([IDS]))
    for name, level in (("feature_3", 4.0), ("feature_7", 2.0)):
        read = run.record[f"blocks.2.hook_steer_observe_{name}"]
        assert read.shape == (1, len(IDS))
        torch.testing.assert_close(read[:, 1:], torch.full((1, len(IDS) - 1), level), atol=1e-4, rtol=0)
    reference = Case("caa", "bridge")
    with sl.steer(reference.model, controller):
        torch.testing.assert_close(steered, reference.logits(torch.tensor([IDS])), atol=2e-5, rtol=0)


def test_the_record_holds_the_reading_that_sae_lens_computes_from_the_cache():
    case, sae = Case("caa", "bridge"), autoencoder()
    target = sl.sae.feature(sae, 3, level=4.0)
    _, cache = case.model.run_with_cache(torch.tensor([IDS]))
    with sl.steer(case.model, sl.sae.hold(case.model, target, where="all")) as run:
        _, steered = case.model.run_with_cache(torch.tensor([IDS]))
    read = sae.encode(cache["resid_post", 2])[..., 3].detach()
    torch.testing.assert_close(run.record["blocks.2.hook_steer_feature"][:, 1:], read[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.encode(steered["resid_post", 2])[0, 1:, 3], torch.full((6,), 4.0))


def plant(model, layers=4, d=32):
    """A linear model of made-up Jacobians, so that the optimum has a closed form."""
    generator = torch.Generator().manual_seed(3)
    jacobians = torch.eye(d) + 0.2 * torch.randn(layers, d, d, generator=generator)
    path = torch.randn(layers + 1, d, generator=generator)
    return Linearization(jacobians, path, sl.hosts.host_of(model).fingerprint(), 1)


def test_lqr_of_a_feature_is_the_least_energy_that_a_dense_solver_finds():
    """One token through the linear model itself: controls of minimal norm with `sum_t Z_{t+1} u_t = z* - z`."""
    model, sae = tiny("llama", host="bridge"), autoencoder()
    linear, target = plant(model), sl.sae.feature(sae, [3, 7], level=[6.0, 3.0])
    controller = sl.lqr(model, target, linearization=linear, r=[1.0, 2.0, 0.5, 1.0], progress=False, limit=None)
    jacobians, path = linear.jacobians.double(), linear.states.double()
    x = path[0] + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(4)).double()
    start, controls = x, []
    for t, loop in enumerate(controller.loops):
        after = path[t + 1] + jacobians[t] @ (x - path[t])
        sensed = x if loop.sense.point == "resid_pre" else after
        law = sl.core.map_tensors(loop.law, lambda tensor: tensor.double())
        controls.append(law.act(sensed[None, None], Now())[0][0, 0])
        x = after + controls[-1]
    setpoint = target.setpoint
    z = setpoint.sensor.double() @ x + setpoint.bias.double()
    torch.testing.assert_close(z, torch.tensor([6.0, 3.0]).double(), atol=1e-4, rtol=0)
    free = start
    for t in range(3):
        free = path[t + 1] + jacobians[t] @ (free - path[t])
    need = torch.tensor([6.0, 3.0]).double() - setpoint.sensor.double() @ free - setpoint.bias.double()
    sensor = setpoint.sensor.double()
    Z = torch.cat([sensor @ jacobians[2] @ jacobians[1], sensor @ jacobians[2], sensor], dim=1)
    scale = torch.tensor([1.0, 2.0, 0.5]).double().repeat_interleave(32)
    best = torch.linalg.lstsq(Z / scale.sqrt(), need, driver="gelsd").solution / scale.sqrt()
    torch.testing.assert_close(torch.cat(controls), best, atol=1e-5, rtol=1e-4)


def test_lqr_at_the_features_layer_alone_is_hold_along_the_encoder():
    model, sae = tiny("llama", host="bridge"), autoencoder()
    led = sl.lqr(model, sl.sae.feature(sae, 3, level=4.0), TEXTS, layers=[2], progress=False, limit=None)
    held = sl.sae.hold(model, sl.sae.feature(sae, 3, level=4.0, along="encoder"))
    x = states(5)
    for u, expected in zip(led.loops[0].law.act(x, Now())[:1], held.loops[0].law.act(x, Now())[:1], strict=True):
        torch.testing.assert_close(u, expected, atol=1e-5, rtol=1e-5)


def test_reach_reports_asked_predicted_and_reached_and_the_bound(host):
    case, sae = Case("caa", host), autoencoder()
    target = sl.sae.feature(sae, 3, level=4.0)
    result = reach(case.model, sl.sae.hold(case.model, target), target, TEXTS)
    assert result.reached.shape == (3, 1)
    # acting where the feature is read, the linear model is exact
    torch.testing.assert_close(result.reached, torch.full((3, 1), 4.0).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.predicted, result.reached, atol=1e-4, rtol=0)
    assert (result.energy >= result.least * (1 - 1e-6)).all()
    assert float(result.miss.max()) < 1e-4
    table = result.table()
    assert {"at_least", "before", "predicted", "reached", "energy", "share", "bound"} <= set(table.columns)
    led = reach(case.model, sl.lqr(case.model, target, TEXTS, progress=False, limit=None), target, TEXTS)
    torch.testing.assert_close(led.reached, torch.full((3, 1), 4.0).double(), atol=1e-4, rtol=0)
    assert (led.least < result.least).all()


def test_the_plot_of_reach_has_axes_with_units():
    pytest.importorskip("plotly")
    model, target = tiny("llama", host="bridge"), sl.sae.feature(autoencoder(), 3, level=4.0)
    figure = reach(model, sl.sae.hold(model, target), target, TEXTS).plot()
    assert "units" in figure.layout.yaxis.title.text
    assert {trace.name for trace in figure.data} == {"asked", "before", "predicted", "reached"}


def test_a_level_beyond_the_limit_is_refused_with_the_bound():
    model, sae = tiny("llama", host="bridge"), autoencoder()
    with pytest.raises(ValueError, match=r"needs a control of .* within the limit of 1 it reaches ([\d.]+)\.") as error:
        sl.lqr(model, sl.sae.feature(sae, 3, level=1e4), TEXTS, progress=False)
    bound = float(str(error.value).split("it reaches ")[1].split(". ")[0])
    sl.lqr(model, sl.sae.feature(sae, 3, level=bound * 0.98), TEXTS, progress=False)
    with pytest.raises(ValueError, match="within the limit"):
        sl.lqr(model, sl.sae.feature(sae, 3, level=bound * 1.02), TEXTS, progress=False)


def test_a_controller_is_kilobytes_and_loads_and_runs_without_sae_lens(tmp_path):
    model, sae = tiny("llama", host="bridge"), autoencoder()
    controller = sl.sae.hold(model, sl.sae.feature(sae, [3, 7], level=[4.0, 2.0]))
    path = tmp_path / "hold.safetensors"
    controller.save(path)
    assert path.stat().st_size < 8_000
    loaded = sl.Controller.load(path)
    x = states(4)
    assert torch.equal(loaded.loops[0].law.act(x, Now())[0], controller.loops[0].law.act(x, Now())[0])
    code = (
        "import sys; sys.modules['sae_lens'] = None\n"
        "import steerlens as sl\n"
        "from steerlens.models import tiny\n"
        "import torch\n"
        f"model, controller = tiny('llama', host='bridge'), sl.Controller.load({str(path)!r})\n"
        f"with sl.steer(model, controller) as run: model(torch.tensor([{IDS}]))\n"
        "assert float(run.record['blocks.2.hook_steer_error'][0, -1]) > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_autoencoder_from_disk_gives_the_same_target(tmp_path):
    sae = autoencoder()
    sae.save_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    a, b = (sl.sae.feature(source, 3, level=4.0) for source in (sae, loaded))
    assert a.site == b.site == Site(2)
    assert torch.equal(a.setpoint.sensor, b.setpoint.sensor)
    assert a.origin == b.origin


def test_rank_features_puts_a_planted_feature_first(host):
    case, sae = Case("caa", host), autoencoder()
    from steerlens.sae.reading import states_of

    site, model_host = Site(2), sl.hosts.host_of(case.model)
    sides = [
        torch.stack([x[-1] for x in states_of(model_host, side.tokens, site)]) for side in case.data.sides(model_host)
    ]
    with torch.no_grad():
        gap = sides[0].mean(0) - sides[1].mean(0)
        sae.W_enc[:, 11] = gap
        sae.b_dec.zero_()
        sae.b_enc[11] = -(gap @ (sides[0].mean(0) + sides[1].mean(0)) / 2)
        sae.threshold[11] = 0
        expected = [sae.encode(side)[:, 11].double() for side in sides]
    table = sl.sae.rank_features(case.model, sae, case.data, by="effect")
    assert len(table) == 40
    assert table.effect.abs().is_monotonic_decreasing
    row = table.loc[11]
    torch.testing.assert_close(torch.tensor(row.positive), expected[0].mean(), atol=1e-4, rtol=1e-4)
    spread = ((expected[0].var() + expected[1].var()) / 2).sqrt()
    effect = (expected[0].mean() - expected[1].mean()) / spread
    torch.testing.assert_close(torch.tensor(row.effect), effect, atol=1e-3, rtol=1e-3)
    assert 11 in table.index[:5]


def test_describe_finds_the_token_with_the_highest_reading_and_links_to_neuronpedia(host):
    case = Case("caa", host)
    sae = autoencoder(metadata={"hook_name": HOOK, "prepend_bos": False, "neuronpedia_id": "some-model/2-res"})
    told = sl.sae.describe(case.model, sae, 3, TEXTS, width=2)
    assert told.link == "https://www.neuronpedia.org/some-model/2-res/3"
    read = [context[0] for context in told.contexts]
    assert read == sorted(read, reverse=True)
    from steerlens.sae.reading import states_of

    x = states_of(sl.hosts.host_of(case.model), TEXTS, Site(2))
    expected = max(float(sae.encode(state)[1:, 3].detach().max()) for state in x)
    assert read[0] == pytest.approx(expected, rel=1e-4)
    assert sl.sae.describe(case.model, autoencoder(), 3, TEXTS).link is None


def test_states_of_a_batch_are_those_of_each_text_alone(host):
    from steerlens.sae.reading import states_of

    model_host = sl.hosts.host_of(Case("caa", host).model)
    together = model_host.states(TEXTS, [Site(2)], batch=2)[Site(2)]
    for text, x in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(x, states_of(model_host, [text], Site(2))[0], atol=1e-5, rtol=1e-5)


def test_quantile_is_that_of_the_readings_where_the_feature_is_on():
    from steerlens.sae.reading import states_of

    model, sae = tiny("llama", host="bridge"), autoencoder()
    x = torch.cat([state[1:] for state in states_of(sl.hosts.host_of(model), TEXTS, Site(2))])
    read = sae.encode(x)[:, 3].detach()
    target = sl.sae.feature(sae, 3, quantile=0.75, model=model, texts=TEXTS)
    assert target.at_least[0] == pytest.approx(float(read[read > 0].double().quantile(0.75)), rel=1e-5)


def test_the_shipped_autoencoder_says_where_it_belongs_and_is_small():
    sae = smollm2_sae()
    assert sae.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    assert len(sae.cfg.metadata.slice_indices) == sae.cfg.d_sae
    from importlib import resources

    folder = resources.files("steerlens") / "data" / "sae"
    size = sum(len(entry.read_bytes()) for entry in folder.iterdir())
    assert size < 1_500_000
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert math.isfinite(float(sae.W_enc.sum()))


def test_the_kept_controller_is_that_of_the_shipped_autoencoder():
    kept = sl.Controller.load(DATA / "feature.safetensors")
    arguments = kept.recipe["arguments"]
    setpoint = sl.sae.feature(smollm2_sae(), arguments["features"], level=arguments["at_least"]).setpoint
    assert torch.equal(kept.loops[0].law.setpoint.sensor, setpoint.sensor)
    assert torch.equal(kept.loops[0].law.gains, setpoint.basis)
