"""Mistakes get one clear sentence before any forward pass, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts, discover_methods, snapshot

PAIRS = sl.Pairs([[1, 2, 3]], [[4, 5, 6]])


@pytest.fixture
def model(host, tiny_model):
    """A model whose forward pass fails: whatever is refused here was refused before it."""
    model = tiny_model(host)
    module = getattr(model, "_module", None) or getattr(model, "original_model", model)
    before = snapshot(model)
    handle = module.register_forward_pre_hook(_refuse)
    yield model
    handle.remove()
    assert snapshot(model) == before


def _refuse(module, args):
    raise AssertionError("a forward pass was run")


def controller(site, width=32, **options):
    return sl.Controller([sl.Loop(sl.Add(torch.ones(width)), site, **options)])


def test_unknown_layer(model):
    with pytest.raises(ValueError, match=r"no hook point 'blocks.9.hook_resid_post' in a model of 4 layers"):
        sl.steer(model, controller(sl.Site(9)))
    with pytest.raises(ValueError, match="no layer 7 in a model of 4 layers"):
        sl.caa(model, PAIRS, layers=7)
    with pytest.raises(ValueError, match="names a layer twice"):
        sl.caa(model, PAIRS, layers=[1, -3])


def test_unknown_point():
    with pytest.raises(ValueError, match="no point 'residual'; a point is one of resid_pre"):
        sl.Site(1, "residual")


def test_wrong_width(model):
    with pytest.raises(ValueError, match=r"the Add at blocks.1.hook_resid_post does not fit a state of shape \[32\]"):
        sl.steer(model, controller(sl.Site(1), width=31))


def test_another_models_controller(model):
    recipe = {"method": "caa", "model": {"n_layers": 30, "d_model": 576}}
    foreign = sl.Controller([sl.Loop(sl.Add(torch.ones(32)), sl.Site(1))], recipe)
    with pytest.raises(
        ValueError, match=r"fitted on another model: n_layers is 4, it was 30; d_model is 32, it was 576"
    ):
        sl.steer(model, foreign)
    sl.steer(model, foreign, trust=True).remove()


def test_other_weights_of_the_same_architecture(host, tiny_model):
    fitted = sl.caa(tiny_model(host), PAIRS)
    with pytest.raises(ValueError, match="the weights differ"):
        sl.steer(tiny_model(host, seed=1), fitted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("host", [name for name in discover_hosts() if name != "nnsight"])
def test_processed_and_raw_weights(host, family, tiny_model):
    raw, processed = tiny_model(host, family), tiny_model(host, family, processed=True)
    with pytest.raises(ValueError, match="this model has raw weights, it was fitted on processed ones"):
        sl.steer(raw, sl.caa(processed, PAIRS))
    with pytest.raises(ValueError, match="this model has processed weights, it was fitted on raw ones"):
        sl.steer(processed, sl.caa(raw, PAIRS))


def test_one_models_controller_steers_its_copy_on_another_host(tiny_model):
    first, *others = discover_hosts()
    fitted = sl.caa(tiny_model(first), PAIRS)
    prompt, case = torch.tensor([[5, 6, 7, 8]]), Case("caa", first, model=tiny_model(first))
    with sl.steer(case.model, fitted):
        wanted = case.logits(prompt)
    for host in others:
        case = Case("caa", host, model=tiny_model(host))
        plain = case.logits(prompt)
        with sl.steer(case.model, fitted):
            steered = case.logits(prompt)
        assert not torch.allclose(steered, plain, atol=1e-3)
        torch.testing.assert_close(steered, wanted, atol=1e-5, rtol=1e-5)


def test_empty_pairs():
    for sides in (([], ["a"]), (["a"], [])):
        with pytest.raises(ValueError, match=r"no (positive|negative) texts"):
            sl.Pairs(*sides)
    with pytest.raises(ValueError, match="positive text 1 is empty"):
        sl.Pairs(["a", ""], ["b", "c"])


def test_reading_a_pad(model):
    short = sl.Pairs([[1, 2, 3, 4, 5]], [[6, 7]], read=3)
    with pytest.raises(ValueError, match=r"read=3 lies outside .*2 tokens"):
        sl.caa(model, short)
    with pytest.raises(ValueError, match="carry padding"):
        sl.caa(model, sl.Pairs([[1, 2, 97, 97]], [[3, 4]]))


def test_reading_a_completion_that_is_not_there():
    with pytest.raises(ValueError, match="has no completion"):
        sl.Pairs(["text"], ["other"], read="completion")


def test_a_completion_without_tokens(model):
    with pytest.raises(ValueError, match=r"text 0 .* has no completion tokens to read"):
        sl.caa(model, sl.Pairs([([1, 2], [])], [([1, 2], [3])], read="completion"))
    with pytest.raises(ValueError, match="no label tokens"):
        sl.cold_kernel(model, sl.Pairs([([1, 2], [])], [([1, 2], [3])]))


def test_a_chat_whose_prompt_is_no_prefix_of_it(host, tiny_model):
    model = tiny_model(host)
    tokenizer = model.tokenizer
    before = tokenizer.chat_template
    # drops what it gave before the answer, as templates of reasoning models do
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' + m['content'] + ' ' }}{% endfor %}"
        + "{% if add_generation_prompt %}w9 {% endif %}"
    )
    chats = [
        [{"role": "user", "content": "w2"}, {"role": "assistant", "content": answer}] for answer in ("w3 w4", "w5")
    ]
    try:
        sl.caa(model, sl.Pairs(chats[:1], chats[1:]))  # the last token needs no split
        for fit, read in ((sl.caa, "completion"), (sl.cold_kernel, "last")):
            with pytest.raises(ValueError, match=r"the chat template does not begin .* give \(prompt, completion\)"):
                fit(model, sl.Pairs(chats[:1], chats[1:], read=read))
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("method", discover_methods())
def test_activations_that_are_not_finite(method, tiny_model):
    """A model whose activations overflow is refused by every method, and left as it was."""
    model = tiny_model(discover_hosts()[0], seed=3)
    weight = next(iter(model.original_model.parameters()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    pairs = sl.Pairs(
        [([5, 9], [12, 31]), ([5], [14, 7]), ([8], [9, 41])], [([5, 9], [13]), ([5], [15, 7]), ([8], [10])]
    )
    try:
        with pytest.raises(ValueError, match=r"not finite|non-finite"):
            getattr(sl, method)(model, pairs)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_more_elements_than_there_are(model):
    for fit, words in (
        (lambda: sl.sadi(model, PAIRS, n_elements=10_000), "n_elements=10000, but there are"),
        (lambda: sl.iti(model, PAIRS, n_elements=10_000), "n_elements=10000, but there are"),
    ):
        with pytest.raises(ValueError, match=words):
            fit()


def test_unsupported_models():
    with pytest.raises(TypeError, match=r"cannot steer a torch.nn.modules.linear.Linear"):
        sl.steer(torch.nn.Linear(2, 2), controller(sl.Site(0)))


def test_unknown_keywords(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_idx'"):
        sl.caa(model, PAIRS, layer_idx=3)
    with pytest.raises(ValueError, match="record='everything'"):
        sl.steer(model, controller(sl.Site(1)), record="everything")
    with pytest.raises(ValueError, match="where='first'"):
        sl.steer(model, controller(sl.Site(1)), where="first")
    with pytest.raises(TypeError, match="takes a Controller"):
        sl.steer(model, torch.ones(32))


@pytest.mark.parametrize("weights", [{"q": 0}, {"r": -1}, {"qf": float("nan")}, {"r": float("inf")}])
def test_weights_that_are_not_positive(model, weights):
    with pytest.raises(ValueError, match="must be positive and finite"):
        sl.lqr(model, PAIRS, **weights)


def test_a_text_too_short_to_linearise_on(model):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        sl.lqr(model, PAIRS, linearize_on=[[5]], progress=False)
    with pytest.raises(ValueError, match="linearize_on=0"):
        sl.lqr(model, PAIRS, linearize_on=0, progress=False)


def test_texts_without_a_difference(host, tiny_model):
    same = sl.Pairs([[1, 2, 3]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="identical activations"):
        sl.caa(tiny_model(host), same)
    with pytest.raises(ValueError, match="identical activations at every layer"):
        sl.lqr(tiny_model(host), same, progress=False)


def test_data_that_are_not_pairs(model):
    for method in (sl.caa, sl.actadd, sl.repe, sl.hpr):
        with pytest.raises(TypeError, match=r"data is a list; give steerlens.Pairs"):
            method(model, ["a", "b"])
    with pytest.raises(ValueError, match="actadd needs pairs"):
        sl.actadd(model, sl.Pairs([[1, 2], [3, 4]], [[5, 6]]))


def test_a_loop_cannot_sense_what_comes_later():
    with pytest.raises(ValueError, match=r"cannot sense blocks.3.hook_resid_pre, which comes after"):
        sl.Loop(sl.Add(torch.ones(2)), sl.Site(2), sl.Site(3, "resid_pre"))


def test_a_file_that_is_no_controller(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no controller"):
        sl.Controller.load(path)


class Foreign(sl.Law):
    def __init__(self):
        self.size = 2.0

    def act(self, x, now):
        return self.size * x, {}


def test_a_users_own_law_is_loaded_only_when_it_is_named(tmp_path):
    path = tmp_path / "own.safetensors"
    sl.Controller([sl.Loop(Foreign(), sl.Site(1))]).save(path)
    with pytest.raises(ValueError, match="pass your own classes as laws="):
        sl.Controller.load(path)
    assert sl.Controller.load(path, laws=[Foreign]).loops[0].law.size == 2.0


def test_a_callable_where_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="a callable, which a file cannot hold"):
        controller(sl.Site(1), where=lambda position: position > 1).save(tmp_path / "x.safetensors")


class TestControl:
    """What `lqr`, `pid` and `track` refuse."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"solver": "fast"}, "solver='fast'; it is one of 'dense', 'output', 'scalar'"),
            ({"preview": True}, "preview=True needs solver='output', it is 'scalar'"),
            ({"preview": True, "solver": "output", "setpoint": "angular"}, "setpoint='angular' has none"),
            ({"setpoint": "corner"}, "setpoint='corner'; it is one of 'level', 'angular'"),
            ({"origin": "mean"}, "origin='mean'; it is one of 'own', 'zero', 'negative', 'midpoint', None"),
            ({"combine": "sum"}, "combine='sum'"),
            ({"angle_rad": 10}, "angle_rad=10 belongs to setpoint='angular'"),
            ({"setpoint": "angular", "level": 2.0}, "it has no level, and origin='zero'"),
            ({"setpoint": "angular", "angle_rad": float("nan")}, "angle_rad=nan"),
            ({"level": float("nan")}, "level=nan; it must be finite"),
            ({"level": [1.0, 2.0]}, "level has 2 numbers for 1 concepts"),
            ({"q": [0.1, 0.1]}, "q has 2 weights for 4 layers"),
            ({"r": [1, 1, 0, 1]}, "r=0; the weights of the regulator must be positive and finite"),
            ({"q": [1, 1, float("nan"), 1]}, "q=nan"),
            ({"layers": [9]}, "no layer 9"),
            ({"layers": []}, "layers is empty"),
        ],
    )
    def test_arguments_of_lqr(self, model, options, words):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are compared below)
            sl.lqr(model, PAIRS, progress=False, **options)
        assert words.replace("r=0;", "r=0.0;") in str(error.value)

    def test_data_that_is_no_contrast(self, model):
        for method in (sl.lqr, sl.pid):
            with pytest.raises(TypeError, match=r"data holds a list; give steerlens.Pairs"):
                method(model, [[1, 2, 3]])
            with pytest.raises(ValueError, match="data is empty"):
                method(model, [])
            with pytest.raises(ValueError, match="takes one concept, data holds 2"):
                method(model, [PAIRS, PAIRS], setpoint="angular")

    def test_gains_of_pid(self, model):
        with pytest.raises(ValueError, match="the gains must be finite, and one of them other than 0"):
            sl.pid(model, PAIRS, kp=0, ki=0, kd=0)
        with pytest.raises(ValueError, match="kd=nan"):
            sl.pid(model, PAIRS, kd=float("nan"))
        with pytest.raises(ValueError, match="reset_every=0; it is a number of layers, or None"):
            sl.pid(model, PAIRS, reset_every=0)

    def test_a_trajectory_of_another_length(self, model):
        with pytest.raises(ValueError, match=r"path has shape \[5, 32\]; this model needs \[4, 32\]"):
            sl.track(model, [1, 2, 3], path=torch.zeros(5, 32))
        with pytest.raises(ValueError, match="path is not finite"):
            sl.track(model, [1, 2, 3], path=torch.full((4, 32), torch.nan))
        with pytest.raises(TypeError, match=r"path is a list; give a tensor \[layer d\]"):
            sl.track(model, [1, 2, 3], path=[[0.0]])
        with pytest.raises(ValueError, match="a text to linearise on needs at least 2 tokens"):
            sl.track(model, [1])
        with pytest.raises(ValueError, match=r"solver='output' weighs directions; give steerlens.Pairs"):
            sl.track(model, [1, 2, 3], solver="output")

    def test_a_linearization_of_another_model(self, model, tiny_model, host):
        other = sl.linearize(tiny_model(host, seed=1), [[1, 2, 3]], progress=False)
        for fit in (
            lambda: sl.lqr(model, PAIRS, linearization=other),
            lambda: sl.track(model, PAIRS, linearization=other),
        ):
            with pytest.raises(ValueError, match="the linearization is of another model: the weights differ"):
                fit()

    def test_a_layer_without_direction_is_told(self, host, tiny_model):
        same = sl.Pairs([[5, 9, 12, 31], [8, 9, 31]], [[5, 9, 13, 31], [8, 10, 31]])  # one last token
        words = r"identical activations at layers \[0\] \(at layer 0 whenever all texts end in the same token\): these"
        with pytest.warns(UserWarning, match=words):
            assert sl.lqr(tiny_model(host), same, progress=False).layers == [1, 2, 3]
        with pytest.warns(UserWarning, match=words):
            assert sl.lqr(tiny_model(host), same, layers=[0, 2], progress=False).layers == [2]
        with pytest.raises(ValueError, match="identical activations at every layer"):
            sl.lqr(tiny_model(host), same, layers=0, progress=False)

    def test_a_model_whose_weights_are_not_finite(self, host):
        broken = tiny("llama", host=host)
        named = dict(getattr(broken, "_module", broken).named_parameters())
        # of the MLP: TransformerBridge makes zeros of a NaN in attention's pattern
        weight = next(named[name] for name in named if ".1." in name and "mlp" in name and named[name].ndim > 1)
        with torch.no_grad():
            weight[(0,) * weight.ndim] = torch.nan
        for method in (sl.lqr, sl.pid):
            with pytest.raises(ValueError, match=r"an activation at blocks.2.hook_resid_pre is not finite"):
                method(broken, PAIRS)
        for call in (sl.linearize, sl.track):
            with pytest.raises(ValueError, match=r"the state before block 2 is not finite on a text to linearise on"):
                call(broken, [[1, 2, 3]], progress=False)

    def test_a_linearization_that_is_not_finite(self, model, host):
        plant = sl.linearize(tiny("llama", host=host), [[1, 2, 3]], progress=False)
        plant.jacobians[2, 0, 0] = torch.nan
        for solver in ("dense", "output", "scalar"):
            with pytest.raises(ValueError, match=r"the linearization is not finite at blocks \[2\]"):
                sl.lqr(model, PAIRS, solver=solver, linearization=plant)
