"""Takes the pictures of the page's tabs with a browser: `python -m dit_accel.demos.page_pictures`.

It starts the page on this machine alone, does in every tab what a visitor would, and writes `demo-TAB.png`
below `demos/assets`. It needs chromium and the extra `[dev]`. `--tab`, `--dark` and `--width` show how a tab
looks elsewhere; give `--out` with them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_accel.errors import UnavailableError

ASSETS = Path("demos/assets")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu")
PATIENCE = 300_000  # milliseconds, on a machine that does much else
PATTERN, MODEL = "Neighborhood", "hunyuan-video  1280×720×129"


def _generate(page: Any) -> None:
    page.locator("#compare").click()
    page.locator("#figures .best").first.wait_for()


def _masks(page: Any) -> None:
    page.locator("#mask-summary dd").first.wait_for()
    for field, value in (("Geometry of", MODEL), ("Pattern", PATTERN)):
        page.get_by_label(field, exact=True).first.click()
        page.get_by_role("option", name=value, exact=True).click()
        page.wait_for_timeout(2000)
    page.get_by_text("step at best").wait_for()


def _heads(page: Any) -> None:
    page.locator("#heat button.head.chosen").first.click()
    page.locator("#head-figures dd").first.wait_for()


def _high_resolution(page: Any) -> None:
    page.locator("#enlarge").click()
    page.locator("#highres-note strong").nth(1).wait_for()


def _evaluate(page: Any) -> None:
    page.locator("#table").wait_for()
    page.locator("#plot canvas, #plot svg").first.wait_for()


TABS: dict[str, Callable[[Any], None]] = {
    "Generate": _generate,
    "Masks": _masks,
    "Heads": _heads,
    "High resolution": _high_resolution,
    "Evaluate": _evaluate,
}


def take(tabs: list[str], out: Path, width: int = 1360, dark: bool = False) -> list[Path]:
    """The pictures of these tabs, `demo-<tab>.png` in a folder.

    Raises:
        UnavailableError: no browser here.
    """
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    from .app import for_this_machine, served

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UnavailableError("pictures of the page need a browser; install chromium")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with served(for_this_machine(), quiet=True) as (address, _), sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=browser, args=list(FLAGS))
        for name in tabs:
            page = chromium.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(PATIENCE)
            page.goto(f"{address}?__theme=dark" if dark else f"{address}?__theme=light")
            page.wait_for_selector("#compare")
            page.get_by_role("tab", name=name, exact=True).click()
            TABS[name](page)
            page.wait_for_timeout(2000)  # for pictures to load and notes to fade
            paths.append(out / f"demo-{name.lower().replace(' ', '-')}.png")
            page.screenshot(path=paths[-1], full_page=True)
            page.close()
        chromium.close()
    return paths


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.demos.page_pictures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--tab", action="append", choices=TABS, help="of this tab alone; repeat it")
    parser.add_argument("--out", type=Path, default=ASSETS, help=f"folder (default {ASSETS})")
    parser.add_argument("--width", type=int, default=1360, help="of the window in pixels")
    parser.add_argument("--dark", action="store_true", help="in the dark theme")
    given = parser.parse_args()
    for path in take(given.tab or list(TABS), given.out, given.width, given.dark):
        print(path)


if __name__ == "__main__":
    main()
