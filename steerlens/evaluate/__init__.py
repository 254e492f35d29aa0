"""Does a controller help, and what did it break? `sl.evaluate(model, controller, effect)`, and the meters for it.

effect = sl.evaluate.propensity(items)
found = sl.evaluate(model, controller, effect, damage=[sl.evaluate.kl()])
print(found.table())
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from steerlens.evaluate import datasets
from steerlens.evaluate.bench import Arm, Bench, Prompt, prompt
from steerlens.evaluate.calibration import Calibration, calibrate
from steerlens.evaluate.evaluation import Choice, Evaluation, Measured
from steerlens.evaluate.likelihoods import ab, kl, likelihood, logit_difference, mc, neutral_loss, propensity
from steerlens.evaluate.meter import Budget, Meter
from steerlens.evaluate.scorers import alignment, concept, profanity, sentiment
from steerlens.evaluate.scoring import log_probabilities, scored_logits
from steerlens.evaluate.separation import Separation, separation
from steerlens.evaluate.study import compare, sweep
from steerlens.evaluate.study import evaluate as _evaluate
from steerlens.evaluate.texts import Generation, generate_texts
from steerlens.evaluate.written import distinct, fluency, nll, refusal, repetition, scorer

__all__ = [
    "Arm",
    "Bench",
    "Budget",
    "Calibration",
    "Choice",
    "Evaluation",
    "Generation",
    "Measured",
    "Meter",
    "Prompt",
    "Separation",
    "ab",
    "alignment",
    "calibrate",
    "compare",
    "concept",
    "datasets",
    "distinct",
    "fluency",
    "generate_texts",
    "kl",
    "likelihood",
    "log_probabilities",
    "logit_difference",
    "mc",
    "neutral_loss",
    "nll",
    "profanity",
    "prompt",
    "propensity",
    "refusal",
    "repetition",
    "scored_logits",
    "scorer",
    "sentiment",
    "separation",
    "sweep",
]


class Verb(ModuleType):
    """A module that is also the verb it is named after."""

    __doc__ = __doc__

    def __call__(self, *arguments: Any, **options: Any) -> Evaluation:
        """What a controller does at several strengths; see `steerlens.evaluate.study.evaluate`."""
        return _evaluate(*arguments, **options)


Verb.__call__.__doc__ = _evaluate.__doc__
sys.modules[__name__].__class__ = Verb
