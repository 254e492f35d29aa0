"""`steerlens fit` and `generate`: a controller from a file of pairs, and what a model writes with it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlens.cli.loading import HOST, MODEL, Library, load_model
from steerlens.cli.mistakes import quiet_output
from steerlens.cli.options import known_method, on_model, read_options
from steerlens.cli.writing import check_controller_path
from steerlens.core import Controller
from steerlens.evaluate import generate_texts
from steerlens.fit.contrast import READINGS, Pairs, Read
from steerlens.hosts import host_of

AS_JSON = typer.Option(False, "--json", help="Print the answer as JSON.")


def fit_command(
    pairs: Path = typer.Argument(  # noqa: B008
        ..., help="Contrast pairs: csv or JSON lines with the columns positive and negative, and perhaps prompt."
    ),
    out: Path = typer.Option(  # noqa: B008
        None, "--out", "-o", help="Where to write the controller. Default: METHOD.safetensors, here."
    ),
    method: str = typer.Option("caa", "--method", "-m", help="See steerlens methods."),
    layers: str = typer.Option(None, "--layers", "--layer", help="Where to act: 15, or 3,9, or 5-10, or all."),
    options: list[str] = typer.Option(  # noqa: B008
        [], "--set", "-s", metavar="NAME=VALUE", help="An option of the method, such as strength=2; may be repeated."
    ),
    read: str = typer.Option(
        None, help="Which activation of a text to take: last, mean, completion, or a position. Default: mean, or "
        "completion if there are prompts."
    ),
    positive: str = typer.Option(None, help="Column with the wanted texts, if it has another name."),
    negative: str = typer.Option(None, help="Column with the others."),
    prompt: str = typer.Option(None, help="Column with the prompt that both texts complete."),
    model: str = MODEL,
    host: Library = HOST,
    as_json: bool = AS_JSON,
) -> None:  # fmt: skip
    """Fit a controller on contrast pairs and write it to a file."""
    known = known_method(method)
    chosen = read_options(known, [*([f"layers={layers}"] if layers is not None else []), *options])
    path = out or Path(f"{method}.safetensors")
    check_controller_path(path)
    data = Pairs.from_file(pairs, positive=positive, negative=negative, prompt=prompt, read=_reading(read))
    start = time.monotonic()
    with quiet_output():
        loaded = load_model(model, host)
        loading_s = time.monotonic() - start
        controller = known.function(loaded, data, **on_model(chosen, loaded))
    fitting_s = time.monotonic() - start - loading_s
    controller.save(path)
    if as_json:
        found = {
            "file": str(path),
            "bytes": path.stat().st_size,
            "method": method,
            "sites": [str(site) for site in controller.sites],
            "recipe": controller.recipe,
            "texts": [len(data.positive), len(data.negative)],
            "read": data.read,
            "model": model,
            "host": host.value,
            "fitting_s": round(fitting_s, 3),
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{path}: {controller!r}")
    typer.echo(
        f"fitted in {fitting_s:.1f} s on {len(data.positive)} positive and {len(data.negative)} negative texts of "
        f"{pairs}, read={data.read!r}"
    )
    own = "" if model == "smollm2" else f" --model {model}"
    own += "" if host is Library.bridge else f" --host {host.value}"
    typer.echo(f'next: steerlens generate {path} "I think that"{own}')


def generate_command(
    file: Path = typer.Argument(..., help="A controller's file, from steerlens fit."),  # noqa: B008
    prompts: list[str] = typer.Argument(None, help="Beginnings of texts; or see --prompts."),  # noqa: B008
    prompt_file: Path = typer.Option(None, "--prompts", help="A text file with one prompt a line."),  # noqa: B008
    more: list[Path] = typer.Option([], "--and", help="One more controller's file; may be repeated."),  # noqa: B008
    strength: float = typer.Option(1.0, help="Factor on every control; 0 is off."),
    tokens: int = typer.Option(40, min=1, help="Tokens to write, at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="Of the sampling; 0 takes the likeliest token."),
    seed: int = typer.Option(0, help="Of the sampling."),
    chat: bool = typer.Option(False, "--chat", help="Prompts are a user's messages, answered by the assistant."),
    trust: bool = typer.Option(False, "--trust", help="Steer although the controller was fitted on another model."),
    model: str = MODEL,
    host: Library = HOST,
    as_json: bool = AS_JSON,
) -> None:
    """What a model writes after prompts, unsteered and steered side by side."""
    if prompts and prompts[0].endswith(".safetensors") and len(prompts) == 1 and not prompt_file:
        raise ValueError(f"{prompts[0]} is a file, not a prompt; for two controllers write --and {prompts[0]}")
    given = [*(prompts or []), *(_lines(prompt_file) if prompt_file else [])]
    if not given:
        raise typer.BadParameter('no prompts; write some behind the file, "I think that", or give --prompts FILE')
    controllers = {name: Controller.load(path) for name, path in _named([file, *more]).items()}
    texts: list[Any] = [[{"role": "user", "content": text}] for text in given] if chat else list(given)
    with quiet_output():
        loaded = load_model(model, host)
        if chat and not getattr(host_of(loaded).tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer of {model} has no chat template; leave --chat out")
        written = _written(loaded, controllers, texts, strength, tokens, temperature, seed, trust)
    if as_json:
        rows = [{"prompt": text} | {name: own[row] for name, own in written.items()} for row, text in enumerate(given)]
        typer.echo(json.dumps({"model": model, "host": host.value, "strength": strength, "texts": rows}))
        return
    for line in _side_by_side(given, written):
        typer.echo(line)


def _reading(word: str | None) -> Read | None:
    if word is None or word in READINGS:
        return cast(Read | None, word)
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"--read {word}: it is one of {', '.join(READINGS)}, or a position such as -1") from None


def _lines(path: Path) -> list[str]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a text file with one prompt a line")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return found


def _named(paths: list[Path]) -> dict[str, Path]:
    """Files by what they are called in the answer: the name without its ending, or the whole path for the second."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a controller's file in it")
        if not path.is_file():
            raise FileNotFoundError(f"there is no controller file {path}; make one: steerlens fit PAIRS --out {path}")
        found[str(path) if path.stem in found or path.stem == "unsteered" else path.stem] = path
    return found


def _written(
    model: Any,
    controllers: dict[str, Controller],
    texts: list[Any],
    strength: float,
    tokens: int,
    temperature: float,
    seed: int,
    trust: bool,
) -> dict[str, list[str]]:
    options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
    # steered ones first: a controller that does not fit is refused before anything slow is done
    found = {
        name: [text.text for text in generate_texts(model, own, texts, strength=strength, trust=trust, **options)]
        for name, own in controllers.items()
    }
    return {"unsteered": [text.text for text in generate_texts(model, None, texts, **options)]} | found


def _side_by_side(prompts: list[str], written: dict[str, list[str]]) -> list[str]:
    """One table a prompt, one column a text."""
    lines: list[str] = []
    for row, prompt in enumerate(prompts):
        table = Table(*written, title=Text(prompt), title_justify="left", expand=True)
        table.add_row(*(Text(texts[row].strip()) for texts in written.values()))
        page = io.StringIO()
        Console(file=page).print(table)
        lines.append(page.getvalue().rstrip("\n"))
    return lines
