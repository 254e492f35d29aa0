"""The real NDIF server on this machine's loopback, from an environment that does not hold steerlens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# what the server's processes get of the user's environment: no PYTHONPATH that shows them steerlens, no token, no Ray
INHERITED = ("HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "HF_HOME", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the folder of its logs."""

    url: str
    folder: Path

    def tails(self, lines: int = 25) -> str:
        """The last lines of every log that has any, the newest log last."""
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
        return "the NDIF test server needs Redis: apt-get install redis-server (or: brew install redis)"
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
        FileNotFoundError: no model in the folder.
    """
    hint = missing()
    if hint:
        raise RuntimeError(hint)
    model_dir = Path(model_dir).resolve()
    if not (model_dir / "config.json").exists():
        raise FileNotFoundError(f"no config.json in {model_dir}; save a model and its tokenizer there")
    names = ("redis", "gcs", "client", "dashboard", "agent", "api", "store")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    # Not $TMPDIR: Ray's Unix sockets lie some 70 characters below it, and their paths may have 107 (on macOS 103).
    server = Server(f"http://127.0.0.1:{ports['api']}", Path(tempfile.mkdtemp(prefix="ndif-", dir="/tmp")))
    settings = _settings(server.folder, ports) | {
        "NDIF_DEPLOYMENTS": model_key(model_dir),
        "NDIF_DEFAULT_DTYPE": dtype,
        "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(request_s),
        "NDIF_SANDBOX_POOL_SIZE": str(runners),
    }
    processes = _Processes(server.folder, settings)
    try:
        try:
            _start(processes, server, ports, model_key(model_dir), time.monotonic() + start_s)
        except Exception as error:
            raise RuntimeError(f"the NDIF test server did not start: {error}\n{server.tails()}") from error
        yield server
    finally:
        processes.end()


def model_key(model_dir: Path) -> str:
    """The name under which nnsight asks for a model of this folder."""
    identity = {"repo_id": str(model_dir), "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(identity)}"


def _settings(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """The environment variables of all processes; makes the folder that their PYTHONPATH names."""
    shim = folder / "shim"
    shim.mkdir()
    # a copy: beside the original lie the tests
    shutil.copy(HERE / "ndif_cpu.py", shim)
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | {
        "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(shim),
        "PYTHONUNBUFFERED": "1",
        # as here: with another number of threads sums are split elsewhere, and differ in the last bits
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        # Ray's switch for laptops; without it Ray puts the machine's outer address in the place of 127.0.0.1, and
        # listens on all interfaces
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
        # nothing listens there: a result above 8 MiB, or one that is fetched later, would need an S3 server
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
        "NDIF_API_PORT": str(ports["api"]),
        # /status answers from a copy that is a minute old by default, and the start waits for what it says
        "NDIF_STATUS_TTL_S": "1",
        # off by default; this client's is newer
        "NDIF_MIN_NNSIGHT_VERSION": "0.8",
        "NDIF_DEFAULT_PADDING_BIAS": "0",
        "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
        "NDIF_CONTROLLER_IMPORT_PATH": "ndif_cpu.CPUControllerActor",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "ndif_cpu.CPUModelActor",
    }


def _start(processes: _Processes, server: Server, ports: dict[str, int], key: str, deadline: float) -> None:
    def wait(what: str, ready: Callable[[], bool]) -> None:
        while not ready():
            processes.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the time was up while waiting for {what}")
            time.sleep(0.25)

    python = str(environment() / "bin" / "python")
    # nothing is written to disk
    redis = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    processes.start("redis", "redis-server", "--port", str(ports["redis"]), *redis)
    processes.start(
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
    wait("Ray", lambda: "Ray runtime started" in processes.log("ray"))
    controller = processes.start("controller", python, "-m", "ndif.services.ray.deployments.controller.controller")
    # nnsight's `.save` on every object breaks the parsing of requests above 1 MB with anyio 4.15 and later
    config = server.folder / "api.yaml"
    config.write_text("APP: {PYMOUNT: false}\n", encoding="utf-8")
    processes.start(
        "api",
        *("env", f"NNSIGHT_CONFIG={config}", python, "-m", "gunicorn"),
        *("--config", "python:ndif.services.api.gunicorn_conf", "--no-control-socket"),
        # NDIF's own configuration binds to all interfaces
        *("-b", server.url.removeprefix("http://"), "ndif.services.api.app:app"),
    )
    # it hands the controller to Ray and ends
    wait("the controller", lambda: controller.poll() == 0)
    wait("the API", lambda: _get(f"{server.url}/connected") is not None)
    wait("the model", lambda: _deployed(_get(f"{server.url}/status"), key))


def _deployed(status: dict | None, key: str) -> bool:
    if status is None:
        return False
    found = [entry for entry in status["deployments"].values() if entry.get("model_key") == key]
    # the controller answers only after it has placed the model
    if not found or found[0]["application_state"] == "UNHEALTHY":
        raise RuntimeError("the model could not be deployed")
    return found[0]["application_state"] == "RUNNING"


def _get(url: str) -> dict | None:
    # no proxy: from there this machine's loopback is another one
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return json.load(response)
    except OSError:
        return None


class _Processes:
    """The server's processes, each with its log; they end with `end()`, and also with the process that started them."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        self.folder = folder
        self.settings = settings
        self.started: dict[str, subprocess.Popen] = {}
        self.guard = subprocess.Popen(
            [sys.executable, str(HERE / "guard.py"), str(folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, name: str, *command: str) -> subprocess.Popen:
        """Starts a process in a session of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                # Python puts the working directory on its path, and Ray hands that path on to its workers: started in
                # the repository, the server would find steerlens
                cwd=self.folder,
                env=self.settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started[name] = process
        self.guard.stdin.write(f"{process.pid}\n")
        self.guard.stdin.flush()
        return process

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Raises RuntimeError when one of them has failed."""
        for name, process in self.started.items():
            if process.poll() not in (None, 0):
                raise RuntimeError(f"{name} ended with exit status {process.returncode}")

    def end(self) -> None:
        """Kills all of them and removes the folder."""
        self.guard.stdin.close()
        if self.guard.wait(timeout=30) != 0:
            raise RuntimeError(f"processes of the NDIF test server may be left: {sorted(self.started)}")
        for process in self.started.values():
            process.wait(timeout=5)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
