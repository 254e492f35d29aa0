"""The test server does the work, and knows nothing of steerlens but what a request brings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import nnsight
import pytest
import torch
from nnsight import TransformersModel

PROMPT = "w1 w2 w3 w4"


@pytest.mark.remote
def test_a_layer_read_on_the_server_equals_the_local_one(client, model_dir):
    with client.trace(PROMPT, remote=True):
        remote = client.model.layers[1].output.save()
    assert not client.dispatched
    local = TransformersModel(str(model_dir), task="text-generation", dispatch=True, dtype=torch.float32)
    with local.trace(PROMPT):
        expected = local.model.layers[1].output.save()
    assert remote.dtype == torch.float32
    # the same kernels on the same machine with one thread each: no rounding differs
    assert torch.equal(remote, expected)


@pytest.mark.remote
def test_the_server_does_not_have_steerlens(client):
    assert "steerlens" not in nnsight.ndif.get_remote_env(force_refresh=True)["packages"]
    with client.trace(PROMPT, remote=True):
        # the packages above are the installed ones; this also sees a folder on the path
        absent = nnsight.save(importlib.util.find_spec("steerlens") is None)
        present = nnsight.save(importlib.util.find_spec("ndif_cpu") is not None)
    assert absent
    assert present, "the block did not run on the server"


def test_a_killed_test_process_leaves_no_server_behind(tmp_path):
    started = (
        "import os, pathlib, sys; from remote.server import _Processes; "
        "processes = _Processes(pathlib.Path(sys.argv[1]), dict(os.environ)); "
        "processes.start('idle', 'sh', '-c', 'sleep 86399 & sleep 86399'); "
        "os.kill(os.getpid(), 9)"
    )
    folder = tmp_path / "server"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", started, str(folder)], cwd=Path(__file__).parents[1], check=False, timeout=60)
    deadline = time.monotonic() + 20
    # the guard removes the folder last, when no process is left
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    alive = subprocess.run(["ps", "-axo", "args="], capture_output=True, text=True, check=True).stdout
    assert "sleep 86399" not in alive
