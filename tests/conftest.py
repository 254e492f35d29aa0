"""Models that the tests share, and the device they run on."""

from __future__ import annotations

import os

# before torch: OpenMP reads these when it is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerlens.models import smollm2, tiny
from steerlens.testing import discover_hosts

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="run the tests on this device, as cuda")
    parser.addoption("--all-models", action="store_true", help="run test_roles.py on every architecture")


def pytest_configure(config):
    config.addinivalue_line("markers", "more_models: an architecture like another that is tested; see --all-models")
    config.addinivalue_line("markers", "lens3: needs TransformerLens 3 or what only runs with it")


def pytest_collection_modifyitems(config, items):
    """Tests in the list of open failures must fail; once they pass they are to be taken off the list."""
    if not config.getoption("--all-models"):
        more = [item for item in items if item.get_closest_marker("more_models")]
        config.hook.pytest_deselected(items=more)
        items[:] = [item for item in items if item not in more]
    path = DATA / "open.txt"
    known = set(path.read_text().splitlines()) if path.exists() else set()
    for item in items:
        if f"{item.path.name}::{item.name}" in known:
            item.add_marker(pytest.mark.xfail(strict=True, reason="open, see tests/data/open.txt"))


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--device {name}, but there is no CUDA device", returncode=2)
    return name


@pytest.fixture(scope="session", params=discover_hosts())
def host(request):
    """Each host whose library is installed."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model(device):
    """Builds a tiny model, or gives the one built before."""

    @cache
    def build(host, family="llama", **options):
        return tiny(family, host=host, device=device, **options)

    return build


@pytest.fixture(scope="session")
def smol(device):
    """SmolLM2 on a host, built once."""

    @cache
    def build(host):
        return smollm2(host=host, device=device)

    return build


@pytest.fixture(scope="session")
def oracle():
    """Reference numbers of the A-LQR paper's rule, recomputed in float64; see tests/data/README.md."""
    return load_file(DATA / "lqr.safetensors")


@pytest.fixture(scope="session")
def texts():
    return json.loads((DATA / "lqr.json").read_text())


@pytest.fixture(scope="session")
def cold_sadi():
    """Reference numbers of COLD-Steer and SADI, tensors and texts; see tests/data/README.md."""
    return load_file(DATA / "cold_sadi.safetensors"), json.loads((DATA / "cold_sadi.json").read_text())
