"""The verbs: what a controller does at several strengths, several methods at one budget, and a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlens.core import Controller
from steerlens.evaluate.bench import UNSTEERED, Arm, Bench, Prompt
from steerlens.evaluate.calibration import search
from steerlens.evaluate.evaluation import RANDOM_NAME, UNSTEERED_NAME, Evaluation
from steerlens.evaluate.likelihoods import kl, neutral_loss
from steerlens.evaluate.log import Log, identity
from steerlens.evaluate.meter import Budget, Meter
from steerlens.evaluate.random import randomized
from steerlens.evaluate.session import Entry, Session, protocol_of
from steerlens.evaluate.written import fluency
from steerlens.fit.contrast import Text
from steerlens.hosts import host_of
from steerlens.hosts.readings import readings
from steerlens.hosts.types import Model

#: Baselines by name, in the order of a table.
BASELINES = (UNSTEERED_NAME, RANDOM_NAME, "prompt")
#: What `compare` takes for a method.
Method = Controller | Prompt | Callable[[], Controller]


def evaluate(
    model: Model,
    controller: Controller,
    effect: Meter,
    *,
    prompts: Sequence[Text] | None = None,
    damage: Sequence[Meter] | None = None,
    baselines: Iterable[str | Prompt] = BASELINES,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    seeds: int = 10,
    file: str | Path | None = None,
    batch: int = 16,
    seed: int = 0,
    max_new_tokens: int = 24,
    temperature: float = 0.8,
    samples: int = 1,
    progress: bool = True,
) -> Evaluation:
    """What a controller does at several strengths, compared with baselines: the effect, and what it costs.

    The strengths are taken as they are. Nothing is chosen on these items, so all of them count; choose a strength with
    `calibrate` on other prompts.

    Args:
        model: TransformerBridge, HookedTransformer or nnsight model, or a host of one.
        controller: What steers.
        effect: The aim.
        prompts: For meters without items of their own; default the effect's.
        damage: What is measured besides; default KL, neutral loss and fluency.
        baselines: `"unsteered"` is always measured. `"random"`: random directions of equal norm at every token, at each
            strength. `"prompt"`: the instruction that the effect brings, or a `prompt("...")` of your own.
        strengths: Factors on every control. The row of strength 0 is measured, and must equal the unsteered one.
        seeds: Number of random directions. The effect is measured on all items for each; the items of other meters on
            logits are dealt to the directions in turn. Dose and texts are those of the first direction, unless the
            effect needs texts.
        file: JSON lines to which each number goes as soon as it is known; a run that was interrupted goes on.
        batch: Texts in one forward pass.
        seed: Of all sampling.
        max_new_tokens, temperature, samples: Of the texts that the model writes, see `Bench`.
        progress: Show a bar.

    Raises:
        ValueError: no prompts are known; two meters of one name; the file was written under another protocol.
        RuntimeError: strength 0 does not give the unsteered model bit for bit; the controller changes no logit.
    """
    meters = _meters(effect, (kl(), neutral_loss(), fluency()) if damage is None else damage)
    bench = _bench(
        model,
        effect,
        prompts,
        batch=batch,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
    )
    name = str(controller.recipe.get("method", "controller"))
    entries = [Entry(UNSTEERED_NAME, lambda: UNSTEERED, 0.0)]
    asked, missing = _prompts(baselines, effect)
    entries += [_prompted(label, own) for label, own in asked.items()]
    steered = [strength for strength in strengths if strength]
    if RANDOM_NAME in baselines:
        entries += [
            _random(bench, lambda: controller, strength, number, seeds)
            for strength in steered
            for number in range(seeds)
        ]
    entries += [_steered(name, lambda: controller, strength) for strength in strengths]
    protocol = protocol_of(bench, meters) | {"verb": "evaluate", "controller": identity(controller), "seeds": seeds}
    protocol |= {"strengths": list(strengths), "prompted": {label: own.instruction for label, own in asked.items()}}
    bench.check_zero(controller)
    bench.log = Log(file, protocol)
    session = Session(bench, meters, bench.log, progress=progress)
    return Evaluation(protocol, effect.name, session.about, session.run(entries), missing=tuple(missing))


def compare(
    model: Model,
    methods: Mapping[str, Method],
    effect: Meter,
    *,
    budget: Budget,
    prompts: Sequence[Text] | None = None,
    damage: Sequence[Meter] | None = None,
    baselines: Iterable[str | Prompt] = BASELINES,
    seeds: int = 10,
    file: str | Path | None = None,
    batch: int = 16,
    seed: int = 0,
    max_new_tokens: int = 24,
    temperature: float = 0.8,
    samples: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Methods side by side, each at the strength at which it spends the same budget.

    Strengths are chosen on every second prompt and reported on the others. Effects are measured on the others' items,
    or on all items if `prompts` are given, since no strength was chosen on them then. A prompt cannot be scaled: it is
    measured as it is, and its row shows what it spends.

    Args:
        model, effect, prompts, damage, file, batch, seed, max_new_tokens, temperature, samples, progress: As for
            `evaluate`.
        methods: `{name: controller}`, a function without arguments that fits one (called only if the file does not hold
            its numbers), or `prompt("...")`.
        budget: `meter <= limit`, as in `evaluate.kl() <= 0.3`.
        baselines: As for `evaluate`. Random directions have the norms of the first controller's control, and share the
            one strength at which they spend the budget together.
        seeds: Number of random directions; see `evaluate`.

    Raises:
        TypeError: the budget is no `meter <= limit`, or a function that gives no controller.
        ValueError, RuntimeError: As `evaluate`; no methods; a method named like a baseline.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is a {type(budget).__name__}; write meter <= limit, as in evaluate.kl() <= 0.3")
    taken = set(methods) & {UNSTEERED_NAME, RANDOM_NAME}
    if taken or not methods:
        raise ValueError(f"methods are {list(methods)}; name at least one, and none like a baseline")
    bench = _bench(
        model,
        effect,
        prompts,
        batch=batch,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
    )
    costs = [
        meter
        for meter in ((neutral_loss(), fluency()) if damage is None else damage)
        if meter.name != budget.meter.name
    ]
    # prompts of their own leave the items untouched by the choice of a strength
    aim = effect.half(True) if prompts is None else effect
    meters = _meters(aim, [budget.meter.half(True), *costs])
    chosen, held = bench.at(bench.prompts[::2]), bench.at(bench.prompts[1::2])
    if not held.prompts:
        raise ValueError("one prompt cannot be halved; give at least two")
    dev = Budget(budget.meter.half(False), budget.limit)
    asked, missing = _prompts(baselines, effect)
    asked = {name: own for name, own in methods.items() if isinstance(own, Prompt)} or asked
    if asked and "a prompt baseline" in missing:
        missing.remove("a prompt baseline")
    fits = {name: _Once(own) for name, own in methods.items() if not isinstance(own, Prompt)}
    protocol = protocol_of(held, meters) | {"verb": "compare", "budget": str(budget), "seeds": seeds}
    protocol |= {"arms": {name: own.identity() for name, own in fits.items()}}
    protocol |= {"prompted": {label: own.instruction for label, own in asked.items()}}
    log = chosen.log = held.log = Log(file, protocol)
    session = Session(held, meters, log, progress=progress)

    def calibrated(name: str, build: Callable[[], list[Controller]]) -> float:
        key = ["calibration", name]
        if key not in log:
            arms = [Arm(name, controller, seed=number) for number, controller in enumerate(build())]
            held.check_zero(arms[0].controller)  # type: ignore[arg-type]
            log.put(key, search(chosen, arms, dev, progress=progress).plain())
        return float(log[key]["strength"])

    entries: list[Entry] = [Entry(UNSTEERED_NAME, lambda: UNSTEERED, 0.0)]
    entries += [_prompted(label, own) for label, own in asked.items()]
    first = next(iter(fits.values()), None)
    with readings(model):
        if RANDOM_NAME in baselines and first is not None:
            # one strength for all directions: they differ among themselves by more than the budget's tolerance
            every = range(max(seeds, 1))
            strength = calibrated(RANDOM_NAME, lambda: [randomized(bench.host, first(), number) for number in every])
            entries += [_random(bench, first, strength, number, seeds) for number in range(seeds)]
        found = list(session.run(entries))
        for name, fit in fits.items():
            strength = calibrated(name, lambda fit=fit: [fit()])  # type: ignore[misc]
            found += session.run([_steered(name, fit, strength)])
    names = [name for name in (RANDOM_NAME, *fits) if ["calibration", name] in log]
    calibrations = {name: log[["calibration", name]] for name in names}
    return Evaluation(protocol, effect.name, session.about, tuple(found), calibrations, tuple(missing))


def sweep(
    model: Model,
    make: Callable[[int, float], Controller],
    effect: Meter,
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
    prompts: Sequence[Text] | None = None,
    damage: Sequence[Meter] | None = None,
    file: str | Path | None = None,
    batch: int = 16,
    seed: int = 0,
    max_new_tokens: int = 24,
    temperature: float = 0.8,
    samples: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Every layer at every strength: `sweep(model, lambda layer, strength: caa(model, pairs, layers=layer, ...), ...)`.

    Of what it returns, `choose("KL", 0.3)` names the best place within a budget: chosen on every second item,
    reported on the others.

    Args:
        model, effect, prompts, file, batch, seed, max_new_tokens, temperature, samples, progress: As for `evaluate`.
        make: From a layer and a strength to a controller.
        layers, strengths: The grid.
        damage: What is measured besides; default the KL.

    Raises:
        ValueError, RuntimeError: As `evaluate`.
    """
    meters = _meters(effect, (kl(),) if damage is None else damage)
    bench = _bench(
        model,
        effect,
        prompts,
        batch=batch,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
    )
    protocol = protocol_of(bench, meters) | {"verb": "sweep", "layers": list(layers), "strengths": list(strengths)}
    protocol |= {"make": getattr(make, "digest", getattr(make, "__name__", type(make).__name__))}
    entries = [Entry(UNSTEERED_NAME, lambda: UNSTEERED, 0.0)]
    for layer in layers:
        for strength in strengths:
            name = f"layer {layer}"

            def build(name: str = name, layer: int = layer, strength: float = strength) -> Arm:
                return Arm(name, make(layer, strength))

            entries.append(Entry(name, build, strength, layer=layer))
    bench.log = Log(file, protocol)
    session = Session(bench, meters, bench.log, progress=progress)
    missing = ("random directions", "a prompt baseline")
    with readings(model):
        found = session.run(entries)
    return Evaluation(protocol, effect.name, session.about, found, missing=missing)


class _Once:
    """A method's controller, fitted when it is first needed."""

    def __init__(self, method: Controller | Callable[[], Controller]):
        self._method = method
        self._controller = method if isinstance(method, Controller) else None

    def __call__(self) -> Controller:
        if self._controller is None:
            made = self._method()  # type: ignore[operator]
            if not isinstance(made, Controller):
                raise TypeError(f"a method's function gave a {type(made).__name__}, not a Controller")
            self._controller = made
        return self._controller

    def identity(self) -> Any:
        """For the protocol: the controller's, or what the function declares."""
        if isinstance(self._method, Controller):
            return identity(self._method)
        return {"fit": getattr(self._method, "digest", getattr(self._method, "__qualname__", "?"))}


def _meters(effect: Meter, damage: Sequence[Meter]) -> list[Meter]:
    meters = [effect, *damage]
    names = [meter.name for meter in meters]
    if len(set(names)) < len(names):
        raise ValueError(f"two meters have one name: {', '.join(names)}; rename one with dataclasses.replace")
    return meters


def _bench(model: Model, effect: Meter, prompts: Sequence[Text] | None, **options: Any) -> Bench:
    known = effect.prompts if prompts is None else prompts
    if not known:
        raise ValueError(f"the items of {effect.name!r} have no prompts; give prompts=[...], for KL and texts")
    return Bench(host_of(model), known, **options)


def _prompts(baselines: Iterable[str | Prompt], effect: Meter) -> tuple[dict[str, Prompt], list[str]]:
    """The prompt baselines by name, and what is missing."""
    given = list(baselines)
    unknown = [own for own in given if not isinstance(own, Prompt) and own not in BASELINES]
    if unknown:
        raise ValueError(f"baselines {unknown} are unknown; there are {', '.join(BASELINES)} and prompt('...')")
    own = [baseline for baseline in given if isinstance(baseline, Prompt)]
    if "prompt" in given and effect.instruction and not own:
        own = [Prompt(effect.instruction)]
    missing = [] if own else ["a prompt baseline"]
    missing += [] if RANDOM_NAME in given else ["random directions"]
    labels = ["prompt", *(f"prompt {number}" for number in range(2, len(own) + 1))]
    return dict(zip(labels, own, strict=False)), missing


def _prompted(name: str, own: Prompt) -> Entry:
    return Entry(name, lambda: Arm(name, None, 1.0, own.instruction), 1.0)


def _steered(name: str, build: Callable[[], Controller], strength: float) -> Entry:
    return Entry(name, lambda: Arm(name, build(), strength), strength)


def _random(bench: Bench, build: Callable[[], Controller], strength: float, seed: int, count: int) -> Entry:
    def make() -> Arm:
        return Arm(RANDOM_NAME, randomized(bench.host, build(), seed), strength, "", seed)

    return Entry(RANDOM_NAME, make, strength, seed, dealt=count)
