"""Random batches, positions, gates, schedules, caches and ways to generate, on every host, against the reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from steerlens.testing import discover_hosts
from tests.reference import Reference, selected
from tests.sequence_cases import Draw, Library, compare, forward, generation

FAMILIES = ("llama", "gpt2", "gemma")
HOSTS = discover_hosts()
LIBRARIES = [*HOSTS, *(["lens"] if "bridge" in HOSTS else [])]
HUGGING = [name for name in LIBRARIES if name in ("bridge", "nnsight")]


@cache
def library(name, family="llama"):
    return Library(name, family)


def each(name, seeds, case, offset=0):
    """Draw cases and check them all; a failure lists the first and how many."""
    failed = []
    for seed in range(offset, offset + seeds):
        draw = Draw(seed)
        lib = library(name, FAMILIES[seed % len(FAMILIES)])
        try:
            case(lib, draw)
        except Exception as error:
            failed.append(f"seed {seed} ({lib.family}): {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} of {seeds} cases; " + "\n".join(failed[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_itself_is_causal_and_plain_without_loops(family):
    """A pass over the whole row has what passes over its beginnings have, so one pass a row is enough."""
    draw = Draw(5)
    lib = library(HOSTS[0], family)
    text = draw.text(8, 8)
    plain = lib.plain(input_ids=torch.tensor([text])).logits[0]
    assert torch.equal(lib.reference().row(text, 5)[0], plain)
    reference = lib.reference(draw.controller(family))
    whole, controls = reference.row(text, 5)
    for length in range(5, 9):
        logits, part = reference.row(text[:length], 5)
        torch.testing.assert_close(logits, whole[:length], rtol=1e-4, atol=1e-4)
        for site, u in part.items():
            torch.testing.assert_close(u, controls[site][:length], rtol=1e-4, atol=1e-4)
    assert any(u.any() for u in controls.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_adds_what_it_says_it_adds(family):
    """What the next block reads differs from the unsteered state by the recorded control."""
    import steerlens as sl
    from tests.reference import Push

    lib = library(HOSTS[0], family)
    loop = sl.Loop(Push(torch.arange(32.0)), sl.Site(1), where=slice(2, 4))
    states = []
    block = getattr(lib.plain.base_model, "h" if family == "gpt2" else "layers")[2]
    handle = block.register_forward_pre_hook(lambda module, args: states.append(args[0][0]))
    lib.reference().row([3, 4, 5, 6, 7], 5)
    _, controls = Reference(lib.plain, family, sl.Controller([loop])).row([3, 4, 5, 6, 7], 5)
    handle.remove()
    torch.testing.assert_close(states[1] - states[0], controls[sl.Site(1)], rtol=1e-4, atol=1e-4)
    assert controls[sl.Site(1)][2:4].any(1).all()
    assert not controls[sl.Site(1)][[0, 1, 4]].any()


def test_the_reference_selects_what_the_names_say():
    table = {where: [t for t in range(6) if selected(where, t, 4)] for where in ("last", "last_prompt", "all")}
    assert table == {"last": [3, 4, 5], "last_prompt": [3], "all": [1, 2, 3, 4, 5]}
    assert [t for t in range(6) if selected("prompt", t, 4)] == [1, 2, 3]
    assert [t for t in range(6) if selected("generated", t, 4)] == [4, 5]
    assert [t for t in range(6) if selected(slice(-2, None), t, 4)] == [2, 3, 4, 5]
    assert [t for t in range(3) if selected("last", t, 1)] == [1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_one_forward_pass(name, side):
    def case(lib, draw):
        texts = [draw.text() for _ in range(draw.randint(1, 3))]
        controller = draw.controller(lib.family, batch=draw.choice([None, len(texts)]), memory=True)
        compare(forward(lib, texts, side, controller), lib.reference(controller))

    each(name, 24, case)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_greedy_generation(name, cached):
    def case(lib, draw):
        length = draw.randint(1, 8)
        texts = [draw.text(length, length) for _ in range(draw.randint(1, 3))]
        memory = cached
        controller = draw.controller(lib.family, batch=draw.choice([None, len(texts)]), memory=memory)
        key = "use_cache" if name in HUGGING else "use_past_kv_cache"
        seen = generation(lib, texts, draw.randint(1, 5), controller, **{key: cached})
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)

    each(name, 21, case, offset=1000)


@pytest.mark.parametrize("name", LIBRARIES)
def test_greedy_generation_of_padded_prompts(name):
    def case(lib, draw):
        texts = [draw.text() for _ in range(draw.randint(2, 3))]
        controller = draw.controller(lib.family, batch=draw.choice([None, len(texts)]), memory=True)
        seen = generation(lib, texts, draw.randint(1, 5), controller)
        compare(seen, lib.reference(controller), forbidden=lib.forbidden)

    each(name, 21, case, offset=2000)


@pytest.mark.parametrize("name", HUGGING)
def test_sampled_generation(name):
    def case(lib, draw):
        texts = [draw.text() for _ in range(draw.randint(1, 2))]
        controller = draw.controller(lib.family)
        torch.manual_seed(draw.randrange(1000))
        options = {"do_sample": True, "top_k": 20, "num_return_sequences": draw.randint(1, 3)}
        seen = generation(lib, texts, draw.randint(1, 5), controller, **options)
        compare(seen, lib.reference(controller), produced="sampled")

    each(name, 18, case, offset=3000)
