"""`steerlens doctor`: what is installed, which libraries can be steered, what does not go together, and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import typer

from steerlens.cli.mistakes import FAILED, quiet_output
from steerlens.models.cache import MANIFEST, cache_folder, verify
from steerlens.version import __version__

#: Packages by what they are for; those of the second group are needed, one of the third is.
NEEDED = ("torch", "einops", "safetensors", "tqdm")
HOSTS = ("transformer-lens", "nnsight")
OTHERS = ("transformers", "sae-lens", "plotly", "pandas", "kaleido", "typer", "rich", "gguf", "lm-eval", "inspect-ai")
#: Extra of the package -> what it brings.
EXTRAS = {
    "lens": "TransformerLens, a library that is steered",
    "nnsight": "nnsight, a library that is steered, here or on a server",
    "sae": "features of sparse autoencoders",
    "plots": "figures and tables",
    "eval": "lm-eval and Inspect",
    "demo": "this command line, and the demo's model",
}
#: Model class -> package, module.
CLASSES = {
    "TransformerBridge": ("transformer-lens", "transformer_lens.model_bridge"),
    "HookedTransformer": ("transformer-lens", "transformer_lens"),
    "TransformersModel": ("nnsight", "nnsight"),
}


def doctor_command(as_json: bool = typer.Option(False, "--json", help="Print the answer as JSON.")) -> None:
    """What is installed and whether it goes together; exit code 1 if nothing can be steered or something clashes."""
    with quiet_output():
        found = examine()
    typer.echo(json.dumps(found) if as_json else "\n".join(_page(found)))
    if not found["ok"]:
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything that `steerlens doctor` prints, as plain JSON."""
    versions = {name: version(name) for name in (*NEEDED, *HOSTS, *OTHERS)}
    hosts = {name: _usable(package, module, name) for name, (package, module) in CLASSES.items()}
    clashes, missing = _requirements()
    usable = any(own["usable"] for own in hosts.values())
    cache = _cache()
    clashes += [cache["fault"]] if cache["fault"] else []
    return {
        "ok": usable and not clashes,
        "steerlens": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "hosts": hosts,
        "clashes": clashes,
        "missing": missing,
        "devices": _devices(),
        "cache": cache,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }


def version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable(package: str, module: str, name: str) -> dict[str, Any]:
    """Whether a model class can be imported, and else why not."""
    if version(package) is None:
        extra = "lens" if package == "transformer-lens" else package
        return {"usable": False, "why": f"{package} is not installed: pip install 'steerlens[{extra}]'"}
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a library raises that does not go with another
        return {"usable": False, "why": f"importing {module} fails: {type(error).__name__}: {error}"}
    if found is None:
        return {"usable": False, "why": f"{package} {version(package)} does not have it; use another of these classes"}
    return {"usable": True, "why": ""}


def _requirements() -> tuple[list[str], list[str]]:
    """What is installed and does not go together, and what is missing, from steerlens's own list of requirements."""
    from packaging.version import Version

    clashes: list[str] = []
    missing: list[str] = []
    for extra, own in _by_extra().items():
        # an extra is in use if the package that it is about is there
        if extra and version(next(iter(own))) is None:
            if extra in EXTRAS:
                missing.append(f"{EXTRAS[extra]}: pip install 'steerlens[{extra}]'")
            continue
        for package, bounds in own.items():
            installed = version(package)
            if installed is None:
                line = f"pip install '{package}{bounds}'"
                (missing if extra else clashes).append(f"{package}, which {extra or 'steerlens'} needs: {line}")
            elif not bounds.contains(Version(installed), prereleases=True):
                user = next(iter(own)) if extra and package != next(iter(own)) else "steerlens"
                clashes.append(
                    f"{package} {installed} does not go with {user}, which needs {bounds}: "
                    f"pip install '{package}{bounds}'"
                )
    return list(dict.fromkeys(clashes)), list(dict.fromkeys(missing))


def _by_extra() -> dict[str, dict[str, Any]]:
    """Required versions, by extra and package, in the order in which they are listed; `""`: always needed."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, Any]] = {}
    for line in importlib.metadata.requires("steerlens") or ():
        requirement = Requirement(line)
        for extra in ("", *EXTRAS):
            marker = requirement.marker
            wanted = marker.evaluate({"extra": extra}) if marker else not extra
            if wanted and (marker is None or extra) and requirement.name != "steerlens":
                found.setdefault(extra, {})[requirement.name] = requirement.specifier
    # an extra that holds others is listed with what they need; it is they who need it
    for held in ("lens", "plots"):
        for package in found.get(held, {}):
            found.get("demo", {}).pop(package, None)
    return found


def _devices() -> list[str]:
    import torch

    found = [f"CPU, {os.cpu_count()} threads"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        own = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}, {own.name}, {own.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    if len(found) == 1 and torch.version.cuda is None and shutil.which("nvidia-smi"):
        found.append("there is an NVIDIA driver, but this torch is built without CUDA: install a CUDA build of torch")
    return found


def _cache() -> dict[str, Any]:
    """The folder of converted models, what is in it, and what is wrong with it."""
    folder, models, fault = cache_folder(), [], ""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / MANIFEST).exists() or (path / "config.json").exists():
            try:
                verify(path)
            except OSError as error:
                fault = str(error)
            models.append(path.name)
    above = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if not os.access(above, os.W_OK):
        fault = f"the cache folder {folder} cannot be written; set STEERLENS_CACHE to another"
    free = shutil.disk_usage(above).free / 2**30 if above.exists() else 0.0
    return {"folder": str(folder), "models": models, "free_gib": round(free, 1), "fault": fault}


def _page(found: dict[str, Any]) -> Iterator[str]:
    yield f"steerlens {found['steerlens']}, Python {found['python']}, {found['system']}"
    installed = [f"{name} {own}" for name, own in found["versions"].items() if own]
    yield f"installed: {', '.join(installed)}"
    for name, own in found["hosts"].items():
        yield f"{'usable' if own['usable'] else 'not usable':10} {name}{': ' + own['why'] if own['why'] else ''}"
    for device in found["devices"]:
        yield f"device     {device}"
    cache = found["cache"]
    held = f"holds {', '.join(cache['models'])}" if cache["models"] else "empty; the first smollm2() converts a model"
    yield f"cache      {cache['folder']} ({held}; {cache['free_gib']} GiB free)"
    yield f"hub        {'HF_HUB_OFFLINE is set: only models that are here' if found['offline'] else 'asked for models'}"
    for line in found["missing"]:
        yield f"missing    {line}"
    for line in found["clashes"]:
        yield f"clash      {line}"
    yield "all is well" if found["ok"] else "see the lines above: nothing can be steered yet, or something clashes"
