"""A running demo of two small models, and a real browser where there is one."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SMALL = {"Width": "64", "Height": "64", "Steps": "2"}
RECIPE = "attention: {pattern: Clear, radius: 3}\ndense_steps: 1\n"
RECIPE_OF_VIDEO = "attention: {pattern: Neighborhood, window: [2, 4, 4]}\n"
PATIENCE = 300_000  # milliseconds, on a machine that does much else


@pytest.fixture(scope="session")
def settings():
    import torch

    from dit_accel.demos.settings import Caps, Settings

    caps = Caps(waiting=4)
    return Settings(torch.device("cpu"), torch.float32, models=("tiny-flux", "tiny-wan"), caps=caps)


@pytest.fixture(scope="session")
def demo(settings):
    """Its address, and what its tabs share."""
    from types import SimpleNamespace

    from dit_accel.demos.app import served

    with served(settings, quiet=True) as (address, studio):
        yield SimpleNamespace(address=address.rstrip("/"), studio=studio)


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no browser here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    with sync_api.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, demo):
    """Opens the page in a visitor's browser of its own, at a tab; no error may appear in its console."""
    contexts, errors = [], []

    def opened(tab="Generate"):
        context = browser.new_context(viewport={"width": 1360, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo.address)
        page.wait_for_selector("#compare")
        if tab != "Generate":
            page.get_by_role("tab", name=tab, exact=True).click()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture(scope="session")
def client_of():
    """A visitor without a browser, by the address of a demo."""
    from gradio_client import Client

    patience = {"timeout": PATIENCE / 1000}
    return lambda address: Client(address, verbose=False, download_files=False, httpx_kwargs=patience)


@pytest.fixture(scope="session")
def client(demo, client_of):
    return client_of(demo.address)


@pytest.fixture(scope="session")
def held_out():
    """A prompt that a bundled model knows."""
    from dit_accel.demos import examples

    return {name: examples.prompts(name)[0] for name in ("tiny-flux", "tiny-wan")}


@pytest.fixture(scope="session")
def small(held_out):
    """Arguments of `/compare` and `/generate` for a small picture."""
    return ("tiny-flux", held_out["tiny-flux"], RECIPE, 64, 64, None, 2, 4.0, 1)


def keep_typed(page, fields, *more):
    """Types values into fields by label, and `more`: (element, text, how to write it) each, until they stay.

    The page sets a field that has just appeared once more, some milliseconds later, over what was typed.
    """
    boxes = {page.get_by_label(label, exact=True): value for label, value in fields.items()}
    looks = 0
    for _ in range(PATIENCE // 1000):
        wrong = [
            lambda box=box, value=value: box.fill(value)
            for box, value in boxes.items()
            if box.input_value() != value
        ]
        wrong += [write for element, text, write in more if element.inner_text().split() != text.split()]
        for write in wrong:
            write()
        looks = 0 if wrong else looks + 1
        if looks == 3:
            return
        page.wait_for_timeout(200)
    raise AssertionError("what was typed does not stay")


@pytest.fixture(scope="session")
def make_small():
    """Fills in a small size on the page of the tab Generate."""

    def fill(page, recipe=RECIPE, **values):
        page.get_by_text("Size, steps and seed").click()
        page.get_by_text("Recipe as text").click()
        editor = page.locator("#recipe .cm-content")

        def write():
            editor.click()
            page.keyboard.press("Control+A")
            page.keyboard.insert_text(recipe)

        keep_typed(page, {**SMALL, **values}, (editor, recipe, write))

    return fill
