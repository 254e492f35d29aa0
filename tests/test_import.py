"""That importing steerlens brings in nothing that the user has not asked for."""

from __future__ import annotations

import subprocess
import sys


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.strip()


def test_no_host_library_is_imported():
    libraries = ("transformer_lens", "nnsight", "sae_lens", "transformers")
    code = f"import sys, steerlens; print([name for name in {libraries} if name in sys.modules])"
    assert run(code) == "[]"


def test_import_is_light_beside_torch():
    """Modules, not seconds: the count cannot flicker. torch itself brings over a thousand."""
    code = "import torch, sys; before = set(sys.modules); import steerlens; print(*set(sys.modules) - before)"
    heavy = {"pandas", "plotly", "sklearn", "scipy", "matplotlib", "rich", "typer", "IPython", "jaxtyping"}
    assert not heavy & {name.split(".")[0] for name in run(code).split()}


def test_one_host_does_not_import_the_other():
    code = (
        "import sys, nnsight, steerlens as sl; from steerlens.models import tiny; from steerlens.hosts import host_of;"
        "host_of(tiny(host='nnsight')); print('transformer_lens' in sys.modules)"
    )
    assert run(code) == "False"
