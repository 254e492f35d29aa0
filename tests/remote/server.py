"""The real NDIF server on this machine's loopback, from an environment that does not hold steerlens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL = "apt-get install redis-server"
# The server's processes get these and nothing else: no PYTHONPATH that would show them steerlens, no token, no Ray address.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "HF_HOME", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the folder of its logs."""

    url: str
    folder: Path

    def tails(self, lines: int = 25) -> str:
        """The last lines of every log that has any."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("ray/session_latest/logs/worker-*")]
        parts = []
        for log in sorted(logs, key=lambda log: log.stat().st_mtime):
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            if last:
                parts.append("\n".join([f"---- {log.relative_to(self.folder)}", *last]))
        return "\n".join(parts)


def environment() -> Path:
    """The folder of the server's virtual environment."""
    return Path(os.environ.get("STEERLENS_NDIF_VENV") or HERE.parents[1] / ".venv-ndif").absolute()


def missing() -> str | None:
    """What has to be installed before the server can start, in one line, or None."""
    if shutil.which("redis-server") is None:
        return f"the NDIF test server needs redis-server: {INSTALL}"
    if not (environment() / "ready").exists():
        return f"the NDIF test server needs its environment: tests/remote/make_env.sh {environment()}"
    return None


@contextlib.contextmanager
def ndif_server(
    model_dir: str | Path,
    *,
    dtype: str = "float32",
    start_s: float = 300,
    request_s: float = 120,
    runners: int = 1,
) -> Iterator[Server]:
    """Redis, Ray, NDIF's controller and its API, with one model deployed.

    Args:
        model_dir: A folder with configuration, weights and tokenizer; its absolute path is the model's name, for client
            and server. Another folder that a request names is deployed on that request.
        dtype: Of the weights on the server.
        start_s: How long the start may take, the deployment included.
        request_s: How long a request may run on the server before it is ended with an error.
        runners: Sandbox processes kept warm for untrusted requests, a third of a GB each.

    Raises:
        RuntimeError: something is not installed, a process ended, or the time was up; with the tails of the logs.
    """
    hint = missing()
    if hint:
        raise RuntimeError(hint)
    model_dir = Path(model_dir).resolve()
    if not (model_dir / "config.json").exists():
        raise FileNotFoundError(f"no config.json in {model_dir}; save a model and its tokenizer there")
    # Not $TMPDIR: Ray's Unix sockets lie some 70 characters below it, and their paths may have 107 (on macOS 103).
    folder = Path(tempfile.mkdtemp(prefix="ndif-", dir="/tmp"))
    ports = dict(zip(("redis", "gcs", "client", "dashboard", "agent", "api", "store"), _free_ports(7), strict=True))
    server = Server(f"http://127.0.0.1:{ports['api']}", folder)
    settings = _settings(folder, ports) | {
        "NDIF_DEPLOYMENTS": model_key(model_dir),
        "NDIF_DEFAULT_DTYPE": dtype,
        "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(request_s),
        "NDIF_SANDBOX_POOL_SIZE": str(runners),
    }
    deadline = time.monotonic() + start_s
    services: list[_Service] = []
    try:
        try:
            _start(services, server, settings, ports, deadline)
        except Exception as error:
            raise RuntimeError(f"the NDIF test server did not start: {error}\n{server.tails()}") from error
        yield server
    finally:
        _stop(services)
        shutil.rmtree(folder, ignore_errors=True)


def model_key(model_dir: Path) -> str:
    """The name under which nnsight asks for a model of this folder."""
    identity = {"repo_id": str(model_dir), "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(identity)}"


def _settings(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """The environment variables of all processes; writes the files that they name."""
    shim = folder / "shim"
    shim.mkdir()
    # a copy: the folder of the original holds the tests
    shutil.copy(HERE / "ndif_cpu.py", shim)
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | {
        "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(shim),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
        # nothing listens there: a result above 8 MiB, or one that is fetched later, would need an S3 server
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
        "NDIF_API_PORT": str(ports["api"]),
        "NDIF_DEFAULT_PADDING_BIAS": "0",
        "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
        "NDIF_CONTROLLER_IMPORT_PATH": "ndif_cpu.CPUControllerActor",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "ndif_cpu.CPUModelActor",
    }


def _start(
    services: list[_Service], server: Server, settings: dict[str, str], ports: dict[str, int], deadline: float
) -> None:
    python = str(environment() / "bin" / "python")

    def start(name: str, *command: str, **more: str) -> _Service:
        service = _Service(name, command, settings | more, server.folder)
        services.append(service)
        return service

    def wait(what: str, ready: Callable[[], bool]) -> None:
        while not ready():
            for service in services:
                if service.failed():
                    raise RuntimeError(f"{service.name} ended with exit status {service.process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the time was up while waiting for {what}")
            time.sleep(0.2)

    loopback = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    start("redis", "redis-server", "--port", str(ports["redis"]), *loopback)
    ray = start(
        "ray",
        *(python, "-m", "ray.scripts.scripts", "start", "--block", "--head", "--node-ip-address=127.0.0.1"),
        # The GPU is a label, without which NDIF sees no node. The sizes are what NDIF may place, not what is reserved.
        *("--num-cpus=4", "--num-gpus=1"),
        '--resources={"head":10,"cuda_memory_bytes":8000000000,"cpu_memory_bytes":1000000000}',
        *(f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}", "--object-store-memory=100000000"),
        # NDIF lists the nodes through the dashboard
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
        *(f"--dashboard-agent-listen-port={ports['agent']}", f"--temp-dir={server.folder / 'ray'}"),
        "--disable-usage-stats",
    )
    wait("Ray", lambda: "Ray runtime started" in ray.log.read_text(encoding="utf-8", errors="replace"))
    controller = start("controller", python, "-m", "ndif.services.ray.deployments.controller.controller")
    # nnsight's `.save` on every object breaks the parsing of requests above 1 MB with anyio 4.15 and later
    config = server.folder / "api.yaml"
    config.write_text("APP: {PYMOUNT: false}\n", encoding="utf-8")
    gunicorn = (python, "-m", "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf")
    # NDIF's own configuration binds to all interfaces
    address = server.url.removeprefix("http://")
    start("api", *gunicorn, "-b", address, "ndif.services.api.app:app", NNSIGHT_CONFIG=str(config))
    wait("the controller", lambda: controller.process.poll() == 0)
    wait("the API", lambda: _get(server.url + "/connected") is not None)
    wait("the model", lambda: _deployed(server))


def _deployed(server: Server) -> bool:
    status = _get(server.url + "/status")
    states = [found.get("application_state") for found in (status or {}).get("deployments", {}).values()]
    if "UNHEALTHY" in states:
        raise RuntimeError("the model could not be deployed")
    return "RUNNING" in states


def _get(url: str) -> dict | None:
    # no proxy: what http_proxy names cannot reach this machine's loopback
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


class _Service:
    """A process group with its log."""

    def __init__(self, name: str, command: tuple[str, ...], settings: dict[str, str], folder: Path):
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            # In the folder: Python puts the working directory on its path, and Ray hands that on to the workers. Started in
            # the repository the server would find steerlens.
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)
