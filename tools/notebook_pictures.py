"""Draw the pictures of docs/notebook.md: what a notebook shows of texts and runs, light, dark and on a telephone.

python tools/notebook_pictures.py           needs Chromium, and takes a minute

Run it again after a change of the pages (`steerlens/pages`), of a repr or of the defaults of `lqr`, and look at them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import steerlens as sl
from steerlens.models import smollm2

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PROMPTS = ["The first thing you notice about the city is", "Everyone at the table went silent when"]
#: Chromium's numbers for what a page is told of the reader's colours.
LIGHT, DARK = 1, 0
#: Name of the page, name of the picture, width and height in pixels, colours.
SHOTS = [
    ("show", "show_light", 1000, 436, LIGHT),
    ("show", "show_dark", 1000, 436, DARK),
    ("show", "show_phone", 500, 540, LIGHT),
    ("run", "run_light", 760, 355, LIGHT),
    ("run", "run_dark", 760, 355, DARK),
]


def main() -> None:
    """Fit, write both pages, and photograph them."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        sys.exit("this needs Chromium")
    model = smollm2()
    pairs = sl.shipped("ocean", split="dev", read="mean")
    loop, vector = sl.lqr(model, pairs, linearize_on=2, progress=False), sl.caa(model, pairs, strength=1.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sl.show(model, PROMPTS, {"lqr": loop, "caa": vector}, max_new_tokens=26).save(folder / "show.html")
        with sl.steer(model, loop) as run:
            model.generate("I think that", max_new_tokens=8, do_sample=False, verbose=False)
        page = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        (folder / "run.html").write_text(f'{page}<body class="sl-page">{run._repr_html_()}')
        for source, target, width, height, colours in SHOTS:
            command = [
                *(browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"),
                f"--blink-settings=preferredColorScheme={colours}",
                f"--screenshot={FOLDER / target}.png",
                (folder / f"{source}.html").as_uri(),
            ]
            subprocess.run(command, check=True, capture_output=True)
            print(FOLDER / f"{target}.png")


if __name__ == "__main__":
    main()
