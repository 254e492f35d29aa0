"""That a written value arrives, for each point and host; signals as hook points; threads; the user's own tools."""

from __future__ import annotations

import threading

import pytest
import torch

import steerlens as sl
from steerlens.core import POINTS
from steerlens.hosts import host_of
from steerlens.testing import Case, discover_hosts, snapshot

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
FAMILIES = ["llama", "gemma", "gpt2"]


def case_of(tiny_model, host, family="llama"):
    case = Case("caa", host, family=family, model=tiny_model(host, family))
    case.controller = case.fit()
    return case


def push(model, site, size=3.0, where="all"):
    host = host_of(model)
    vector = torch.linspace(-size, size, steps=int(torch.tensor(host.shape(site)).prod())).reshape(host.shape(site))
    return sl.Controller([sl.Loop(sl.Add(vector), site, where=where)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("point", POINTS)
def test_a_written_value_arrives_alike_on_every_host(point, family, tiny_model):
    results = {}
    for host in discover_hosts():
        case = case_of(tiny_model, host, family)
        plain = case.logits(IDS)
        with sl.steer(case.model, push(case.model, sl.Site(2, point))):
            results[host] = case.logits(IDS)
        assert (results[host] - plain).abs().max() > 0.05, f"writing {point} changes nothing on {host}"
    first = next(iter(results))
    for host, logits in results.items():
        case.close(logits, results[first], f"{point} on {host} against {first}", factor=5)


@pytest.mark.parametrize("point", ["attn_out", "mlp_out"])
def test_a_branch_written_equals_the_stream_written_after_it(point, host, tiny_model):
    """Adding to a branch's output and to the residual stream right after it are the same; `z` and neurons go through
    the output matrices."""
    case = case_of(tiny_model, host)
    after = {"attn_out": "resid_mid", "mlp_out": "resid_post"}[point]
    with sl.steer(case.model, push(case.model, sl.Site(1, point))):
        a = case.logits(IDS)
    with sl.steer(case.model, push(case.model, sl.Site(1, after))):
        b = case.logits(IDS)
    case.close(a, b, f"{point} against {after}", factor=3)


def test_reading_equals_the_librarys_own_cache(host, tiny_model):
    case = case_of(tiny_model, host)
    adapter = host_of(case.model)
    reference = tiny_model(discover_hosts()[0])
    _, cache = reference.run_with_cache(IDS)
    sites = [sl.Site(layer, point) for layer in (0, 3) for point in POINTS]
    weights = [[0.0] * 6 + [1.0], [0.0, 0.5, 0.5, 0, 0, 0, 0]]
    read = adapter.read([IDS[0].tolist()] * 2, weights, sites)
    for site in sites:
        expected = cache[str(site)][0]
        torch.testing.assert_close(read[site][0], expected[-1].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read[site][1], expected[1:3].mean(0).detach(), rtol=1e-4, atol=1e-5)


def test_jacobians_equal_autograd_through_the_whole_model(host, tiny_model):
    """The chain of block Jacobians is the Jacobian of the last token's final state with respect to an earlier one."""
    case = case_of(tiny_model, host)
    nominal = host_of(case.model).nominal(IDS[0].tolist())
    chain = nominal.jacobian(3) @ nominal.jacobian(2)
    model = tiny_model("bridge")
    nudge = torch.zeros(32, requires_grad=True)

    def add(x, hook):
        return torch.cat([x[:, :-1], x[:, -1:] + nudge], dim=1)

    final = []
    with model.hooks([("blocks.2.hook_resid_pre", add), ("blocks.3.hook_resid_post", lambda x, hook: final.append(x))]):
        model(IDS)
    rows = [torch.autograd.grad(final[0][0, -1, i], nudge, retain_graph=True)[0] for i in range(32)]
    torch.testing.assert_close(chain, torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", [name for name in discover_hosts() if name != "nnsight"])
class TestSignalsAreHookPoints:
    def test_cached_filtered_and_stacked(self, host, tiny_model):
        case = case_of(tiny_model, host)
        controller = sl.lqr(case.model, case.data, progress=False, paper=True)
        with sl.steer(case.model, controller) as run:
            _, cache = case.model.run_with_cache(IDS)
            _, filtered = case.model.run_with_cache(IDS, names_filter="blocks.2.hook_steer_error")
        assert cache["steer_error", 2].shape == (1, 7)
        assert cache["steer_u", 2].shape == (1, 7, 32)
        assert list(filtered) == ["blocks.2.hook_steer_error"]
        torch.testing.assert_close(cache["steer_error", 2], run.record["blocks.2.hook_steer_error"], equal_nan=True)
        assert run.to_cache()["steer_error", 2].shape == (1, 7)
        assert "blocks.2.hook_steer_error" not in case.model.run_with_cache(IDS)[1]

    def test_patching_u_restores_the_unsteered_logits(self, host, tiny_model):
        case = case_of(tiny_model, host)
        controller = sl.lqr(case.model, case.data, progress=False, paper=True)
        plain = case.logits(IDS)
        names = [f"blocks.{layer}.hook_steer_u" for layer in controller.layers]
        with sl.steer(case.model, controller):
            patched = case.model.run_with_hooks(IDS, fwd_hooks=[(name, lambda u, hook: 0 * u) for name in names])
        assert torch.equal(patched, plain)

    def test_patching_one_layer_equals_leaving_its_loop_out(self, host, tiny_model):
        case = case_of(tiny_model, host)
        controller = sl.lqr(case.model, case.data, progress=False, paper=True)
        without = controller.only([layer for layer in controller.layers if layer != 2])
        with sl.steer(case.model, without):
            expected = case.logits(IDS)
        with sl.steer(case.model, controller):
            hooks = [("blocks.2.hook_steer_u", lambda u, hook: 0 * u)]
            patched = case.model.run_with_hooks(IDS, fwd_hooks=hooks)
        case.close(patched, expected, "logits with one control patched out")

    def test_several_loops_have_names_of_their_own_beside_the_total(self, host, tiny_model):
        case = case_of(tiny_model, host)
        both = case.controller + case.controller * 0.5
        with sl.steer(case.model, both):
            _, cache = case.model.run_with_cache(IDS)
        total = cache["steer_caa_u", 2] + cache["steer_caa2_u", 2]
        torch.testing.assert_close(cache["steer_u", 2], total)

    def test_nested_runs_do_not_share_names(self, host, tiny_model):
        case = case_of(tiny_model, host)
        with sl.steer(case.model, case.controller), sl.steer(case.model, case.controller * 2):
            _, cache = case.model.run_with_cache(IDS)
        torch.testing.assert_close(cache["steer_run2_u", 2], 2 * cache["steer_u", 2])

    def test_resetting_the_users_hooks_leaves_steering_alone(self, host, tiny_model):
        case = case_of(tiny_model, host)
        with sl.steer(case.model, case.controller):
            steered = case.logits(IDS)
            case.model.add_hook("blocks.1.hook_resid_post", lambda x, hook: 0 * x)
            case.model.reset_hooks()
            assert torch.equal(case.logits(IDS), steered)


def test_recording_off_hooks_no_signal(host, tiny_model):
    case = case_of(tiny_model, host)
    with sl.steer(case.model, case.controller, record=None) as run:
        quiet = case.logits(IDS)
        table = snapshot(case.model)["table"]
    with sl.steer(case.model, case.controller):
        assert torch.equal(quiet, case.logits(IDS))
    assert not len(run.record)
    assert not any("steer" in name for name in table)


def test_the_record_keeps_what_was_asked_for(host, tiny_model):
    case = case_of(tiny_model, host)
    with sl.steer(case.model, case.controller, record=("u",)) as run:
        case.logits(IDS)
    assert [name.rpartition("_")[2] for name in run.record] == ["u"]


def test_gradients_reach_an_added_vector(host, tiny_model):
    case = case_of(tiny_model, host)
    vector = torch.zeros(32, requires_grad=True)
    controller = sl.Controller([sl.Loop(sl.Add(vector), sl.Site(1), where="all")])
    with torch.enable_grad(), sl.steer(case.model, controller):
        case.logits(IDS)[0, -1, 5].backward()
    eps = 1e-2
    direction = vector.grad / vector.grad.norm()
    sides = []
    for sign in (1, -1):
        with torch.no_grad(), sl.steer(case.model, push_vector(direction * eps * sign)):
            sides.append(case.logits(IDS)[0, -1, 5])
    slope = float(sides[0] - sides[1]) / (2 * eps)
    assert slope == pytest.approx(float(vector.grad.norm()), rel=0.02)


def push_vector(vector):
    return sl.Controller([sl.Loop(sl.Add(vector.detach()), sl.Site(1), where="all")])


def test_threads_that_use_different_models_do_not_meet(tiny_model):
    """Each thread steers a model of its own with its own strength, at the same time."""
    from steerlens.models import tiny

    kinds = [name for name in discover_hosts() for _ in range(2)]
    cases = [Case("caa", name, model=tiny(host=name)) for name in kinds]
    expected, got, errors = {}, {}, []
    for index, case in enumerate(cases):
        case.controller = case.fit() * (index + 1)
        with case.steer():
            expected[index] = case.generate(IDS)
    before = [snapshot(case.model) for case in cases]
    barrier = threading.Barrier(len(cases))

    def work(index):
        try:
            barrier.wait(timeout=60)
            for _ in range(3):
                with cases[index].steer():
                    got[index] = cases[index].generate(IDS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not errors
    assert all(torch.equal(got[index], expected[index]) for index in expected)
    assert [snapshot(case.model) for case in cases] == before


def test_generation_without_a_cache_is_told_from_a_new_prompt_one_token_longer(host, tiny_model):
    """Prompts that grow by a token, each generated from anew, are new prompts: only their last token is steered."""
    case = case_of(tiny_model, host)
    with sl.steer(case.model, case.controller, record=("u_norm",)) as run:
        for length in range(3, 6):
            case.generate(IDS[:, :length], 1, cache=False)
            (norms,) = run.record.layers("u_norm").values()
            assert (norms[0] > 0).tolist() == [False] * (length - 1) + [True]


@pytest.mark.parametrize("host", [name for name in discover_hosts() if name != "nnsight"])
def test_a_user_who_decodes_by_hand_is_followed(host, tiny_model):
    case = case_of(tiny_model, host)
    with sl.steer(case.model, case.controller, where="generated", record=("u_norm",)) as run, torch.no_grad():
        if host == "bridge":
            cache = case.model(IDS, use_past_kv_cache=True, return_type="logits_and_cache")[1]
            case.model(IDS[:, :1], use_past_kv_cache=True, past_key_values=cache)
        else:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache = TransformerLensKeyValueCache.init_cache(case.model.cfg, case.model.cfg.device, 1)
            case.model(IDS, past_kv_cache=cache)
            case.model(IDS[:, :1], past_kv_cache=cache)
        (norms,) = run.record.layers("u_norm").values()
    assert (norms[0] > 0).tolist() == [False] * 7 + [True]


def test_linearising_a_steered_model_reads_the_unsteered_one(host, tiny_model):
    """The runs stand down: replayed blocks are those of the plain model."""
    case = case_of(tiny_model, host)
    plain = sl.linearize(case.model, case.data.positive[:1], progress=False)
    with sl.steer(case.model, case.controller):
        inside = sl.linearize(case.model, case.data.positive[:1], progress=False)
    assert torch.equal(inside.jacobians, plain.jacobians)
    assert torch.equal(inside.states, plain.states)


class Product(sl.Law):
    signals = ("product",)

    def __init__(self, v):
        self.v = v

    def act(self, x, now):
        return (x @ self.v)[..., None] * self.v, {"product": lambda: x @ self.v}


def test_laws_compute_in_float32_under_autocast(host, tiny_model):
    case = case_of(tiny_model, host)
    law = Product(torch.linspace(-1, 1, steps=host_of(case.model).d_model))
    controller = sl.Controller([sl.Loop(law, sl.Site(1))])
    with sl.steer(case.model, controller) as run, torch.autocast("cpu", dtype=torch.bfloat16):
        case.logits(IDS)
    assert run.record["blocks.1.hook_steer_product"].dtype == torch.float32


def test_a_control_between_attention_and_mlp_sees_what_comes_later_at_the_blocks_input(tiny_model):
    """A run, and a hook of the user's, that are set after it: as if they had been there before."""
    found = {}
    for host in discover_hosts():
        case = case_of(tiny_model, host)
        held = sl.hold(case.model, case.data, layers=2, point="resid_mid", side="at", level=2.0, where="all")
        shift = push(case.model, sl.Site(2, "resid_pre"), where=slice(0, None))
        with sl.steer(case.model, shift), sl.steer(case.model, held):
            expected = case.logits(IDS)
        with sl.steer(case.model, held), sl.steer(case.model, shift):
            found[host] = case.logits(IDS)
        case.close(found[host], expected, "a run that came later")
        if host != "nnsight":
            vector = shift.loops[0].law.vector
            hook = ("blocks.2.hook_resid_pre", lambda x, hook, vector=vector: x + vector)
            with sl.steer(case.model, held), case.model.hooks(fwd_hooks=[hook]):
                case.close(case.logits(IDS), expected, "a hook that came later")
        case.close(found[host], found["bridge"], "another host")
