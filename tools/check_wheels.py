"""Build the sdist and the wheel, and try each extra alone in an environment of its own.

python tools/check_wheels.py                 all of them, about a quarter of an hour and 2 GB at a time
python tools/check_wheels.py base lens       some

The wheel is built from the sdist, so that a file missing there is noticed. TORCH says what pip installs first, as for
make. Each environment is removed when it has been tried.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0")
STEER = """
import torch, steerlens as sl
from steerlens.models import tiny
model = tiny("llama", host="{host}")
controller = sl.add(torch.ones(32), layer=1)
assert len(sl.runs(model)) == 0
with sl.steer(model, controller):
    assert len(sl.runs(model)) == 1
assert len(sl.runs(model)) == 0
"""
#: What each extra is for, as a program.
TRIES = {
    "base": "import steerlens as sl, torch, sys\n"
    "assert not {'transformer_lens', 'nnsight', 'sae_lens', 'plotly'} & set(sys.modules)\n"
    "sl.add(torch.ones(4), layer=0).save('c.safetensors'); sl.Controller.load('c.safetensors')",
    "lens": STEER.format(host="bridge"),
    "nnsight": STEER.format(host="nnsight"),
    "sae": "from steerlens.models import smollm2_sae\nprint(smollm2_sae().W_dec.shape)",
    "plots": "import torch, steerlens as sl, plotly, pandas\n"
    "from steerlens.plots import plot_record\nsl.shipped('ocean'); sl.shipped_texts('prompts')",
    "hub": "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
    "import steerlens as sl\n"
    "try:\n    sl.Controller.from_hub('nobody/nothing')\n"
    "except OSError as error:\n    print(error)\n"
    "else:\n    raise SystemExit('read a file that is not there')",
    "eval": "from steerlens.evaluate.lm_eval import SteeredLM\n"
    "from steerlens.evaluate.inspect_ai import as_inspect_model",
    "demo": "import subprocess, sys\n"
    "subprocess.run([sys.executable, '-m', 'steerlens.cli', '--help'], check=True)\n"
    "from steerlens.cli.__main__ import app\nfrom steerlens.models import smollm2",
}


def run(*command: str | Path, folder: Path) -> None:
    """Run a command, or stop."""
    print("$", shlex.join(map(str, command)), flush=True)
    subprocess.run([*map(str, command)], check=True, cwd=folder, env=os.environ | {"PYTHONPATH": ""})


def main(chosen: list[str]) -> None:
    """Build, then try."""
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        folder = Path(name)
        tool = environment(folder / "build")
        run(tool, "-m", "pip", "install", "-q", "build", "twine", folder=folder)
        # the wheel comes from the sdist
        run(tool, "-m", "build", "--outdir", folder / "dist", ROOT, folder=folder)
        run(tool, "-m", "twine", "check", "--strict", *sorted((folder / "dist").iterdir()), folder=folder)
        wheel = next((folder / "dist").glob("*.whl"))
        for extra in chosen or TRIES:
            python = environment(folder / extra)
            run(python, "-m", "pip", "install", "-q", *shlex.split(TORCH), folder=folder)
            what = str(wheel) if extra == "base" else f"{wheel}[{extra}]"
            run(python, "-m", "pip", "install", "-q", what, folder=folder)
            run(python, "-c", TRIES[extra], folder=folder)
            subprocess.run(["rm", "-rf", str(folder / extra)], check=True)
            print(f"{extra}: works alone", flush=True)


def environment(folder: Path) -> Path:
    """The Python of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


if __name__ == "__main__":
    main(sys.argv[1:])
