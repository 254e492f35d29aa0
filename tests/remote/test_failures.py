"""What goes wrong on a real NDIF server, or on the way to it: told first, nothing left behind, the next call works."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import time
import traceback

import jaxtyping
import nnsight
import pytest
import torch
import zstandard
from nnsight.intervention.backends import remote as transport
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.request import RequestModel

import steerlens as sl
from remote.expect import IDS, clean

pytestmark = pytest.mark.remote
KEY = "secret-key-123"


class Failing(sl.Law):
    def act(self, x, now):
        if x.any():
            raise ArithmeticError("the law fails on purpose")
        return torch.zeros_like(x), {}


class Slow(sl.Law):
    def act(self, x, now):
        if x.any():
            time.sleep(1.5)
        return torch.zeros_like(x), {}


class ClientOnly(sl.Law):
    def act(self, x, now):
        return x if jaxtyping is None else torch.zeros_like(x), {}


@pytest.fixture
def still_works(client):
    """The call after the failure gives what the call before it gave."""
    before = plain_logits(client)
    # without it nnsight sends the laws above by reference, as those of an installed package
    nnsight.register(sys.modules[__name__])
    yield
    assert clean(client)
    assert torch.equal(plain_logits(client), before)


def plain_logits(client):
    with client.trace(IDS, remote=True):
        logits = client.output.logits.save()
    return logits  # noqa: RET504 (bound by the trace)


def steered(client, controller, **options):
    with sl.steer(client, controller, **options) as run:
        client.generate(IDS, max_new_tokens=1, remote=True)
    return run


def at_one(law):
    return sl.Controller([sl.Loop(law, sl.Site(1))])


def test_a_law_that_raises(client, still_works):
    with pytest.raises(RemoteError, match=r"^the server raised ArithmeticError: the law fails on purpose\n") as caught:
        steered(client, at_one(Failing()))
    assert 'raise ArithmeticError("the law fails on purpose")' in str(caught.value), "the line is not shown"


def test_a_law_that_names_a_package_the_server_lacks(client, still_works):
    words = r"^the server refused: Your request payload could not be read \(ModuleNotFoundError: No module named 'jaxt"
    with pytest.raises(RemoteError, match=words):
        steered(client, at_one(ClientOnly()))


def test_a_result_that_does_not_come_in_time(client, local, still_works):
    words = r"^no result from the NDIF server at http://\S+ within 0\.5 s, the latest status is RUNNING"
    with pytest.raises(TimeoutError, match=words):
        steered(client, at_one(Slow()), timeout_s=0.5)
    assert len(steered(client, local("caa").controller, timeout_s=60).record) > 0


def test_a_server_that_accepts_and_says_nothing(client, local, still_works, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute, monkeypatch.context() as patch:
        patch.setattr(nnsight.CONFIG.API, "HOST", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(TimeoutError, match=r"within 0\.5 s, the latest status is no answer"):
            steered(client, local("caa").controller, timeout_s=0.5)
        with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
            sl.caa(sl.remote(client, timeout_s=0.5), local("caa").data)


def test_a_server_that_is_down(client, local, still_works, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match=r"^the NDIF server at http://127.0.0.1:9 cannot be reached"):
            steered(client, local("caa").controller)
        with pytest.raises(ConnectionError, match=r"^the NDIF server at http://127.0.0.1:9 cannot be reached"):
            sl.caa(sl.remote(client), local("caa").data)


def test_a_client_that_is_too_old_for_the_server(client, local, still_works, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transport, "_NNSIGHT_VERSION", "0.5.0")
        words = r"^the server refused: .*Client nnsight version 0\.5\.0 is below the minimum supported 0\.8\."
        with pytest.raises(RemoteError, match=words):
            steered(client, local("caa").controller)
        with pytest.raises(RemoteError, match=words):
            sl.caa(sl.remote(client), local("caa").data)


def test_a_model_that_the_server_cannot_load(client, local, still_works, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(client, "to_model_key", lambda: type(client).to_model_key(client).replace("model", "nowhere"))
        with pytest.raises(RemoteError, match=r"^the server"):
            steered(client, local("caa").controller)


def test_what_is_refused_before_it_is_sent(client, local, still_works):
    with pytest.raises(ValueError, match=r"the request has .* MB, the limit is 0\.0 MB"):
        steered(client, local("caa").controller, payload_limit=1000)
    with pytest.raises(NotImplementedError, match="blocking=False leaves before the record is there"):
        with sl.steer(client, local("caa").controller):
            with client.trace(IDS, remote=True, blocking=False):
                client.output.logits.save()
    with pytest.raises(NotImplementedError, match="blocking=False leaves before the record is there"):
        with sl.steer(client, local("caa").controller):
            client.generate(IDS, max_new_tokens=2, remote=True, blocking=False)


class Echo(http.server.BaseHTTPRequestHandler):
    """Refuses a key and quotes it."""

    def do_GET(self):
        body = f"no such key: {self.headers['ndif-api-key']}".encode()
        self.send_response(401, "Unauthorized")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_no_key_shows(client, local, still_works, monkeypatch, tmp_path):
    sent = []
    serialize = RequestModel.serialize

    def keep(tracer, compress=False):
        sent.append(serialize(tracer, compress))
        return sent[-1]

    monkeypatch.setattr(RequestModel, "serialize", keep)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    run = steered(client, local("caa").controller)
    fitted = sl.cold_kernel(sl.remote(client), local("cold_kernel").data)
    run.record.save(tmp_path / "record.safetensors")
    fitted.save(tmp_path / "controller.safetensors")
    shown = [repr(run), repr(run.record), repr(run.controller), str(run.controller.recipe), repr(sl.remote(client))]
    with pytest.raises(RemoteError) as failed:
        steered(client, at_one(Failing()))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with http.server.HTTPServer(("127.0.0.1", port), Echo) as echo, monkeypatch.context() as patch:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        patch.setattr(nnsight.CONFIG.API, "HOST", f"http://127.0.0.1:{port}")
        with pytest.raises(ConnectionError, match=r"401 Unauthorized: no such key: <api key>$") as refused:
            steered(client, local("caa").controller)
        echo.shutdown()
    shown += ["".join(traceback.format_exception(caught.value)) for caught in (failed, refused)]
    assert not [text for text in shown if KEY in text]
    blobs = [zstandard.ZstdDecompressor().decompress(blob) for blob in sent]
    assert len(blobs) >= 3
    assert any(b"apply" in blob or b"follow" in blob for blob in blobs), "the payloads could not be searched"
    assert not [blob for blob in blobs if KEY.encode() in blob]
    assert not [path for path in tmp_path.iterdir() if KEY.encode() in path.read_bytes()]
