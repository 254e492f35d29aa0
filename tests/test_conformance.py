"""Every promise, for every method, on every host and family."""

from __future__ import annotations

from functools import cache

import pytest

from steerlens.testing import Case, checks, discover_hosts, discover_methods, run_check

HOSTS, METHODS = discover_hosts(), list(discover_methods())


@cache
def case(method, host, family, device):
    return Case(method, host, family=family, device=device)


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_promise(method, host, family, check, device):
    run_check(check, case(method, host, family, device))


REAL = ("leaves_nothing_behind", "cache_on_equals_off", "batch_row_equals_row_alone", "composes_in_order")


@pytest.mark.real_model
@pytest.mark.parametrize("host", HOSTS)
def test_promises_of_lqr_hold_on_a_real_model(host, smol, device):
    real = Case("lqr", host, device=device, model=smol(host))
    real.controller = real.fit(linearize_on=1)
    for check in checks():
        if check.__name__.removeprefix("check_") in REAL:
            check(real)


def test_suite_fails_a_method_that_breaks_a_promise(device):
    """The suite itself: a controller that touches pads and differs without a cache must not pass."""
    import torch

    from steerlens import Controller, Law, Loop, Site

    class Drifting(Law):
        def act(self, x, now):
            count = now.sequence["count"] = now.sequence.get("count", 0) + 1
            return torch.ones_like(x) * count, {}

    broken = Case("caa", HOSTS[0], device=device)
    broken.controller = Controller([Loop(Drifting(), Site(1), where="all")], broken.fit().recipe)
    named = {check.__name__: check for check in checks()}
    with pytest.raises(AssertionError, match="differ"):
        named["check_cache_on_equals_off"](broken)


def test_suite_fails_a_pass_whose_laws_see_half_precision(device, monkeypatch):
    from steerlens.core import stops

    monkeypatch.setattr(stops, "wide_of", lambda x: x.dtype)
    check = next(check for check in checks() if check.__name__ == "check_dtype_is_kept")
    with pytest.raises(AssertionError, match=r"laws on a torch\.float16 model saw"):
        check(Case("caa", HOSTS[0], device=device))


def test_a_declared_exception_that_does_not_happen_is_an_error(device, monkeypatch):
    case = Case("caa", HOSTS[0], device=device)
    monkeypatch.setitem(case.declared.exceptions, "check_docstring", "words")
    check = next(check for check in checks() if check.__name__ == "check_docstring")
    with pytest.raises(AssertionError, match="but it passes"):
        run_check(check, case)
