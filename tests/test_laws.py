"""Laws and setpoints that a user writes, in ten lines each; what they see, and what of theirs is computed."""

from __future__ import annotations

import pytest
import torch

import steerlens as sl
from steerlens.core import Now, Pass
from steerlens.testing import Case

IDS = torch.tensor([[3, 17, 25, 29, 41, 22, 9]])
SITE = sl.Site(1)


class Band(sl.Setpoint):
    """Keep the projection on a direction between two bounds."""

    signals = ("error", "projection")

    def __init__(self, direction, low, high):
        self.basis, self.low, self.high = direction[None], low, high

    def measure(self, x):
        p = x @ self.basis[0]
        c = p.clamp(self.low, self.high) - p
        return c[..., None], {"error": lambda: c.abs(), "projection": lambda: p}


class Clipped(sl.Law):
    """Proportional feedback with a largest control."""

    signals = ("error",)

    def __init__(self, setpoint, gain, most):
        self.setpoint, self.gain, self.most = setpoint, gain, most

    def act(self, x, now):
        c, signals = self.setpoint.measure(x)
        u = self.gain * self.setpoint.lift(c)
        return u.clamp(-self.most, self.most), {"error": signals["error"]}


DIRECTION = torch.nn.functional.normalize(torch.linspace(-1, 2, 32), dim=0)


def clipped(**options):
    return sl.Controller([sl.Loop(Clipped(Band(DIRECTION, 2.0, 3.0), 0.8, 0.2), SITE, name="clipped", **options)])


def by_hand(tiny_model, ids, factor=1.0, last=True):
    """Logits of the Hugging Face model with a PyTorch hook that does the same; every token, or the last."""
    model = tiny_model("nnsight")._module

    def steer(module, args, output):
        p = output[0] @ DIRECTION if isinstance(output, tuple) else output @ DIRECTION
        u = (0.8 * (p.clamp(2.0, 3.0) - p)[..., None] * DIRECTION).clamp(-0.2, 0.2) * factor
        u[:, : -1 if last else 1] = 0
        return (output[0] + u, *output[1:]) if isinstance(output, tuple) else output + u

    handle = model.model.layers[1].register_forward_hook(steer)
    try:
        with torch.no_grad():
            return model(ids).logits
    finally:
        handle.remove()


def logits(model, host, ids=IDS):
    return Case("caa", host, model=model).logits(ids)


@pytest.fixture(params=["bridge", "nnsight"])
def both(request, tiny_model):
    pytest.importorskip("nnsight")
    return request.param, tiny_model(request.param)


def test_a_users_law_steers_as_a_pytorch_hook_does(both, tiny_model):
    host, model = both
    plain = logits(model, host)
    for controller, expected in (
        (clipped(), by_hand(tiny_model, IDS)),
        (clipped(where="all"), by_hand(tiny_model, IDS, last=False)),
        (clipped() * 0.5, by_hand(tiny_model, IDS, 0.5)),
        (sl.schedule(clipped(), [0.25]), by_hand(tiny_model, IDS, 0.25)),
    ):
        with sl.steer(model, controller):
            torch.testing.assert_close(logits(model, host), expected, rtol=0, atol=2e-5)
        assert (expected - plain).abs().max() > 1e-3


def test_a_users_law_opens_and_closes_with_a_gate(both, tiny_model):
    host, model = both
    gate = sl.Gate(sl.Side(torch.zeros(32), torch.tensor(-1.0)), [sl.Summary(sl.Site(0))])
    with sl.steer(model, sl.when(clipped(), gate)) as run:
        torch.testing.assert_close(logits(model, host), by_hand(tiny_model, IDS), rtol=0, atol=2e-5)
        assert float(run.record["blocks.1.hook_steer_gate"][0, -1]) == 1
        assert float(run.record["blocks.1.hook_steer_score"][0, -1]) == 1
    plain = logits(model, host)
    with sl.steer(model, sl.when(clipped(), ~gate)) as run:
        assert torch.equal(logits(model, host), plain)
        assert float(run.record["blocks.1.hook_steer_gate"][0, -1]) == 0


def test_a_users_law_is_saved_and_loaded(both, tmp_path):
    host, model = both
    controller = clipped(where="all")
    controller.save(tmp_path / "own.safetensors")
    loaded = sl.Controller.load(tmp_path / "own.safetensors", laws=[Clipped, Band])
    records = []
    for each in (controller, loaded):
        with sl.steer(model, each, record="all") as run:
            logits(model, host)
        records.append(run.record.copy())
    assert set(records[0]) == {f"blocks.1.hook_steer_{name}" for name in ("u", "u_norm", "error")}
    for name, value in records[0].items():
        assert torch.equal(value.nan_to_num(), records[1][name].nan_to_num())


class Counting(sl.Law):
    """Adds nothing, and counts how often each of its signals is computed."""

    signals = ("error", "state")
    vectors = ("state",)
    counts = {"error": 0, "state": 0}  # noqa: RUF012 (of the class: a pass works on a copy of the law)

    def act(self, x, now):
        values = {"error": x[..., 0], "state": x}
        return torch.zeros_like(x), {name: lambda name=name: self.count(name, values[name]) for name in values}

    def count(self, name, value):
        Counting.counts[name] += 1
        return value


def counted(call):
    Counting.counts.update(error=0, state=0)
    call()
    return Counting.counts["error"], Counting.counts["state"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, (0, 0)),
        (("u",), (0, 0)),
        (("u", "u_norm"), (0, 0)),
        ("scalars", (1, 0)),
        (("error",), (1, 0)),
        (("state",), (0, 1)),
        ("all", (1, 1)),
    ],
)
def test_a_signal_is_computed_once_a_pass_if_the_record_keeps_it_and_else_never(host, record, expected, tiny_model):
    model = tiny_model(host)
    with sl.steer(model, sl.Controller([sl.Loop(Counting(), SITE, where="all")]), record=record) as run:
        assert counted(lambda: logits(model, host)) == expected
        assert len(run.record) == {None: 0, "scalars": 2, "all": 4}.get(record, 0) or len(record or "")
    with sl.steer(model, sl.Controller([sl.Loop(Counting(), SITE, where=slice(90, 99))]), record=record):
        assert counted(lambda: logits(model, host)) == (0, 0), "computed for a pass in which no token is steered"


def test_scalars_stay_scalars_when_a_pass_steers_no_token(host, tiny_model):
    """A pass without a steered token does not know a vector's width; it is a vector all the same."""
    model, loop = tiny_model(host), sl.Loop(Counting(), SITE, where=slice(90, 99))
    with sl.steer(model, sl.Controller([loop]), record="scalars") as run:
        logits(model, host)
    assert set(run.record) == {"blocks.1.hook_steer_error", "blocks.1.hook_steer_u_norm"}


@pytest.mark.parametrize("host", ["bridge"])
def test_a_signal_is_computed_if_its_hook_point_has_a_hook(host, tiny_model):
    model = tiny_model(host)
    controller = sl.Controller([sl.Loop(Counting(), SITE, where="all")])
    with sl.steer(model, controller, record=("u",)):
        cached = {}

        def cache(names):
            cached.update(model.run_with_cache(IDS, names_filter=names)[1])

        assert counted(lambda: cache(lambda name: name.endswith("steer_state"))) == (0, 1)
        assert cached["blocks.1.hook_steer_state"].shape == (1, 7, 32)
        assert counted(lambda: cache(lambda name: "steer" in name)) == (1, 1)
        assert counted(lambda: logits(model, host)) == (0, 0)
    two = sl.Controller([sl.Loop(Counting(), SITE, where="all", name=name) for name in "ab"])
    with sl.steer(model, two, record=("u",)):
        total = "blocks.1.hook_steer_error"
        assert counted(lambda: model.run_with_cache(IDS, names_filter=total)) == (2, 0)
        assert counted(lambda: model.run_with_cache(IDS, names_filter=lambda name: "error" in name)) == (2, 0)


class Sizes(sl.Law):
    """A signal that a matrix product makes, and one that tells in which dtype the law met the state."""

    signals = ("product", "bits")

    def __init__(self, v):
        self.v = v

    def act(self, x, now):
        bits = torch.finfo(x.dtype).bits * torch.ones_like(x[..., 0])
        return torch.zeros_like(x), {"product": lambda: x @ self.v, "bits": lambda: bits}


@pytest.mark.parametrize("where", ["all", "last"])
def test_signals_are_computed_without_autocast(where):
    state = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    run = Pass([sl.Loop(Sizes(DIRECTION), SITE, where=where)])
    run.begin((1, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (state @ DIRECTION.bfloat16()).dtype == torch.bfloat16
        run.at(SITE, state)
    product = run.log["blocks.1.hook_steer_product"]
    assert product.dtype == torch.float32
    torch.testing.assert_close(product[0, -1], state[0, -1].float() @ DIRECTION)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_laws_see_float32_at_least(host, dtype, tiny_model):
    model = tiny_model(host, dtype=dtype)
    with sl.steer(model, sl.Controller([sl.Loop(Sizes(DIRECTION), SITE)])) as run:
        logits(model, host)
    assert float(run.record["blocks.1.hook_steer_bits"][0, -1]) == (64 if dtype == torch.float64 else 32)


def test_now_keeps_a_memory_for_a_pass_and_one_for_a_sequence():
    now = Now()
    assert now.layers == now.sequence == {}
    now.sequence["kept"] = 1
    assert Now({}, now.sequence, summary=torch.ones(1)).sequence == {"kept": 1}
    with pytest.raises(LookupError, match=r"now\.tangent was asked for, but the loop declares none"):
        Now(summary=torch.ones(1)).tangent  # noqa: B018 (a property)
    with pytest.raises(LookupError, match=r"now\.summary was asked for, but the loop declares none"):
        Now(tangent=torch.ones(1)).summary  # noqa: B018 (a property)


class Remembers(sl.Law):
    """Reports how many layers before it acted in this pass, and how many of the sequence."""

    signals = ("layers", "passes")

    def act(self, x, now):
        now.layers["count"] = layers = now.layers.get("count", 0) + 1
        now.sequence["count"] = passes = now.sequence.get("count", 0) + 1
        ones = torch.ones_like(x[..., 0])
        return torch.zeros_like(x), {"layers": lambda: layers * ones, "passes": lambda: passes * ones}


def test_lifetimes_are_a_pass_and_a_sequence(host, tiny_model):
    case = Case("caa", host, model=tiny_model(host))
    controller = sl.Controller([sl.Loop(Remembers(), layer) for layer in (1, 2)])
    with sl.steer(case.model, controller) as run:
        for _ in range(2):
            case.generate(IDS, 3)
            assert run.record["blocks.2.hook_steer_layers"][0, -3:].tolist() == [2, 2, 2]
            assert run.record["blocks.1.hook_steer_passes"][0, -3:].tolist() == [1, 3, 5]
