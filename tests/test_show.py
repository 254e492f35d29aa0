"""Texts side by side with coloured tokens: texts and numbers are the library's own, and the page is plain HTML."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
import torch

import steerlens as sl
from steerlens.evaluate import generate_texts
from steerlens.models import tiny
from steerlens.testing import Case, discover_hosts, discover_methods

PAIRS = sl.Pairs(["w1 w2 w3", "w7 w8", "w4 w9 w2"], ["w4 w5 w6", "w9 w10", "w8 w3 w3"])
PROMPTS = ["w1 w2", "w30 w31 w32"]
VOID = {"meta", "br", "rect", "hr"}


class Checker(HTMLParser):
    """Whether tags are closed in order; collects text, and whatever would be fetched or run."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.outside = [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "img", "iframe", "object"):
            self.outside.append(tag)
        for name, value in attributes:
            if name in ("src", "href") or name.startswith("on") or "url(" in (value or ""):
                self.outside.append(f"{name}={value}")
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def checked(page):
    found = Checker(page)
    assert found.outside == []
    return "".join(found.words)


@pytest.mark.parametrize("host", discover_hosts())
def test_texts_and_values_are_the_librarys_own(host):
    model = tiny(host=host)
    controllers = {"caa": sl.caa(model, PAIRS, layers=[1, 2]), "lqr": sl.lqr(model, PAIRS, progress=False)}
    shown = sl.show(model, PROMPTS, controllers, strength=0.5, max_new_tokens=6)
    assert list(shown.texts) == ["unsteered", "caa", "lqr"]
    for name, controller in [("unsteered", None), *controllers.items()]:
        alone = [generate_texts(model, controller, [p], strength=0.5, max_new_tokens=6)[0] for p in PROMPTS]
        assert shown.texts[name] == [text.text for text in alone]
        for text, value, pieces in zip(alone, shown.values[name], shown.pieces[name], strict=True):
            ids = [*text.prompt, *text.completion]
            assert value.shape == (len(ids),)
            # whatever is drawn, together, is the text
            drawn = "".join(piece.text for piece in pieces if not piece.prompt)
            assert drawn.strip() == text.text.strip()
            if name == "unsteered":
                assert value.isnan().all()
    # caa adds the same vectors at every steered token: the last of the prompt and all that were read after it
    norms = [0.5 * loop.strength * float(loop.law.vector.norm()) for loop in controllers["caa"]]
    value = shown.values["caa"][0]
    assert value[0] == 0
    assert value[-1].isnan()
    torch.testing.assert_close(value[1:-1], torch.full_like(value[1:-1], math.hypot(*norms)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("host", discover_hosts())
def test_the_values_of_feedback_are_those_of_one_pass_over_the_text(host):
    model = tiny(host=host, dtype=torch.float64)
    controller = sl.lqr(model, PAIRS, progress=False)
    shown = sl.show(model, PROMPTS, controller, signal="error", max_new_tokens=6)
    for row, value in enumerate(shown.values["lqr"]):
        (text,) = generate_texts(model, controller, [PROMPTS[row]], max_new_tokens=6)
        ids = torch.tensor([[*text.prompt, *text.completion]])
        with sl.steer(model, controller) as run, run.scoring(len(text.prompt)):
            if host == "nnsight":
                with model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
                    pass
            else:
                model(ids)
        mean = run.record.stack("error")[:, 0].double().nanmean(0)
        torch.testing.assert_close(value[:-1], mean[:-1], equal_nan=True, rtol=1e-6, atol=1e-8)


def test_every_method_is_shown_and_plotted():
    pytest.importorskip("plotly")
    for name in discover_methods():
        case = Case(name, "bridge")
        options = {"error": 0.9} if name == "tda" else {}
        controller = case.fit(**options)
        shown = sl.show(case.model, [list(case.prompt)], controller, max_new_tokens=4)
        assert "activation units" in checked(shown._repr_html_()) or all(v.isnan().all() for v in shown.values[name])
        with sl.steer(case.model, controller) as run:
            case.model.generate(torch.tensor([case.prompt]), max_new_tokens=3, verbose=False)
        figure = run.plot()
        acting = {(site.layer, site.point) for site in controller.sites}
        assert len(figure.data[-1].y) == len(acting), name
        checked(run._repr_html_())
        checked(controller._repr_html_())


def test_two_points_of_a_layer_are_two_rows_and_two_runs_two_figures():
    pytest.importorskip("plotly")
    model = tiny()
    loops = [sl.Loop(sl.Add(torch.ones(32)), f"blocks.{n}.hook_{p}") for n in (0, 1) for p in ("resid_pre", "mlp_out")]
    doubled = sl.Controller([*loops, sl.Loop(sl.Add(torch.ones(32)), loops[0].act)])
    with sl.steer(model, sl.add(torch.ones(32), layer=2)), sl.steer(model, doubled) as run:
        model(torch.tensor([[3, 4, 5]]))
    (heat,) = run.plot().data
    assert list(heat.y) == ["0 resid_pre", "0 mlp_out", "1 resid_pre", "1 mlp_out"]
    assert heat.customdata[0][2] == pytest.approx(2 * 32**0.5, rel=1e-6)
    assert heat.customdata[1][2] == pytest.approx(32**0.5, rel=1e-6)


def test_features_and_gates_colour_too():
    pytest.importorskip("sae_lens")
    from autoencoders import autoencoder

    model, sae = tiny(), autoencoder()
    target = sl.sae.feature(sae, 3, level=5.0)
    held = sl.sae.hold(model, target)
    shown = sl.show(model, PROMPTS, {"hold": held, "caa": sl.caa(model, PAIRS)}, signal="feature", max_new_tokens=4)
    assert "feature: 0" in checked(shown._repr_html_())
    assert shown.values["caa"][0].isnan().all()
    with sl.steer(model, held) as run:
        model(torch.tensor([[3, 4, 5]]))
    assert len(run.plot().data) == 2
    assert "3" in checked(target._repr_html_())
    gated = sl.when(sl.caa(model, PAIRS), sl.gate(model, PAIRS, gate_layers=0))
    shown = sl.show(model, PROMPTS, gated, signal="gate", max_new_tokens=4)
    values = torch.cat(shown.values["caa"])
    assert set(values[values.isfinite()].tolist()) <= {0.0, 1.0}


def test_markup_in_texts_and_names_stays_text(tmp_path):
    model = tiny()
    bad = '<script>alert("x")</script>&amp;'
    controller = sl.Controller(sl.caa(model, PAIRS).loops, {"method": bad, "arguments": {"a": bad}})
    shown = sl.show(model, [[3, 4, 5]], {bad: controller}, max_new_tokens=3)
    shown.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert bad in checked(page)
    assert bad in checked(controller._repr_html_())
    assert page.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme:dark" in page


def test_a_character_of_several_tokens_is_drawn_once():
    from steerlens.showing import _pieces

    raw = "né 🌊".encode()

    def decode(tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    values = torch.arange(len(raw), dtype=torch.float64)
    pieces = _pieces(list(raw), 1, values, [""] * len(raw), "u_norm", decode)
    assert [piece.text for piece in pieces] == ["n", "é", " ", "🌊"]
    assert [piece.value for piece in pieces] == [0, 1.5, 3, 5.5]


def test_mistakes():
    model = tiny()
    caa = sl.caa(model, PAIRS)
    with pytest.raises(ValueError, match="no controller reports 'eror'; there are, by controller, caa: u_norm"):
        sl.show(model, PROMPTS, caa, signal="eror")
    with pytest.raises(TypeError, match="takes controllers by name"):
        sl.show(model, PROMPTS, [caa])
    with pytest.raises(ValueError, match="no controllers"):
        sl.show(model, PROMPTS, {})
    with pytest.raises(ValueError, match="named 'unsteered'"):
        sl.show(model, PROMPTS, {"unsteered": caa})
    with pytest.raises(TypeError, match="takes a list of prompts"):
        sl.show(model, [], caa)


def test_an_empty_record_and_an_evaluation_have_a_page(tmp_path):
    pytest.importorskip("pandas")
    from evaluating import items

    model = tiny()
    assert "nothing has run" in checked(sl.Record()._repr_html_())
    meter = sl.evaluate.propensity(sl.Pairs([(p, a) for p, a, _ in items(8)], [(p, b) for p, _, b in items(8)]))
    found = sl.sweep(model, lambda layer, strength: sl.caa(model, PAIRS, layers=layer) * strength, meter,
                     layers=[1], strengths=[1.0], progress=False)  # fmt: skip
    words = checked(found._repr_html_())
    assert "layer 1" in words
    assert "wrong way" in words
    assert not math.isnan(float(found.table()["effect"].iloc[-1]))


@pytest.mark.parametrize("low", [1.4, float("nan")])
def test_a_calibration_has_a_page(low):
    curve, budget = ((1.0, 0.125), (2.0, 0.5)), "KL mean <= 0.3"
    controller = sl.add(torch.ones(32), layer=2, strength=1.5)
    found = sl.evaluate.Calibration(controller, 1.5, (low, 1.6), curve, "met", 0.28, budget, note="<b>flat</b>")
    words = checked(found._repr_html_())
    assert "strength 1.5, 1.4 to 1.6 · KL mean <= 0.3" in words or low != low
    assert "nan" not in words
    assert "met, with 0.28; <b>flat</b>" in words
    assert "strengthKL mean10.12520.5" in words
    assert "resid_post" in words


def test_colours_are_washes_that_text_can_be_read_on():
    """Contrast of black on white paper and of near white on near black, WCAG's 4.5, at the strongest wash."""
    from steerlens.pages.markup import wash

    def luminance(colour):
        channels = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    for value in (1.0, -1.0):
        *colour, alpha = map(float, re.findall(r"[\d.]+", wash(value, 1.0)))
        for paper, ink in (((255, 255, 255), (0, 0, 0)), ((21, 23, 26), (230, 230, 230))):
            under = [alpha * c + (1 - alpha) * p for c, p in zip(colour, paper, strict=True)]
            light, dark = sorted((luminance(under), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5
