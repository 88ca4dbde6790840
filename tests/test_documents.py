"""What readers are told works: every Python block, command line and link of the README and the docs."""

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_accel.evals.reports import marked, recipe_table
from dit_accel.pipelines.tiny import INFO, weights_dir
from dit_accel.recipe.recipe import presets

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pipelines/COMPOSITION.md")
    if (ROOT / page).exists()
]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
RESULTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "evals/results").rglob("*.md"))
COMMAND = re.compile(r"^(?:    |\$ )?(dit-accel .*)$", flags=re.MULTILINE)
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
ELSEWHERE = "docs/adding-a-pattern.md"  # goes on with the class of such a file, see test_contributing.py
# code blocks that are all of a file stand in a checkout, where test_contributing.py runs them
FILE = re.compile(r"all of\s+`[\w/]+\.py`[^`]*```python\n.*?```", flags=re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text()


def snippets(page: str) -> list[str]:
    """The Python blocks of a page that a reader would run."""
    return re.findall(r"^```python\n(.*?)^```", FILE.sub("", read(page)), flags=re.DOTALL | re.MULTILINE)


# -- Python --------------------------------------------------------------------------------------------------

SMALL = {"height": 192, "width": 192, "num_inference_steps": 2}  # 24 x 24 tokens, the least of a preset


def shrunk(pipe, run=None):
    """A pipeline that takes the calls of big models, checks their names and makes something small.

    Sizes must be those of a published model's tokens, as the pipeline itself would only warn and round.
    """
    kind = type(pipe)
    names = inspect.signature(kind.__call__).parameters

    def call(self, prompt=None, **options):
        if prompt is None:  # by `run`
            return kind.__call__(self, **options)
        assert set(options) <= set(names)
        for side in ("height", "width"):
            assert options.get(side, 16) % 16 == 0
        assert options.get("num_frames", 1) % 4 == 1
        if run is not None:  # from embeddings to latents
            run(self, steps=2)
            return SimpleNamespace(frames=np.zeros((1, 5, 64, 64, 3), np.float32))
        small = SMALL | ({"num_frames": 5} if "num_frames" in names else {})
        return kind.__call__(self, prompt, max_sequence_length=24, **(options | small))

    functools.update_wrapper(call, kind.__call__)
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    pipe.to = lambda *place: pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def hub(monkeypatch, families):
    """The hub replaced: small pipelines of the same classes."""
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.from_pretrained.__func__
    bundled = {"FluxPipeline": "tiny-flux", "StableDiffusion3Pipeline": "tiny-sd3", "WanPipeline": "tiny-wan"}
    bundled["HunyuanVideoPipeline"] = "tiny-hunyuan-video"
    others = {"HunyuanVideo15Pipeline": "hunyuan15", "SkyReelsV2Pipeline": "skyreels"}

    def from_pretrained(cls, name, **options):
        if Path(name).exists():
            return original(cls, name, **options)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        assert set(options) <= {"torch_dtype"}
        if cls.__name__ in others:
            tools = families[others[cls.__name__]]
            return shrunk(tools.make(), tools.run)
        return shrunk(original(cls, weights_dir(bundled[cls.__name__])))

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page) and page != ELSEWHERE])
def test_python_blocks_run(page, hub, tmp_path, monkeypatch):
    """In the order of the page, as a reader would paste them one after the other."""
    import dit_accel

    monkeypatch.chdir(tmp_path)
    namespace, enabled = {}, set()
    for number, block in enumerate(snippets(page), start=1):
        torch.manual_seed(0)
        exec(compile(block, f"{page}, Python block {number}", "exec"), namespace)
        if "from_pretrained" in block:  # it was run as enabled
            handle = dit_accel.handle_of(namespace["pipe"])
            assert handle.recipe.name in presets(handle.recipe.family)
            assert handle.stats()["calls"] >= 2
            enabled.add(handle.recipe.family)
    if page == "README.md":  # which has snippets for the first families, and a table of all
        assert enabled == {"flux", "hunyuan-video", "hunyuan-video-1.5", "sd3", "skyreels-v2", "wan"}
        assert list(tmp_path.glob("*.png"))


# -- command lines -------------------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """Lines of code blocks that call `dit-accel`, without their comments."""
    return [shlex.join(shlex.split(line, comments=True)) for line in COMMAND.findall(read(page))]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_command_lines_are_understood(page):
    """Commands and options exist, and values are of their types; nothing is run."""
    import typer.main

    from dit_accel.cli import app

    for line in commands(page):
        command, words = typer.main.get_command(app), [w for w in shlex.split(line)[1:] if w != "..."]
        name, context = "dit-accel", None
        while hasattr(command, "commands") and words and words[0] in command.commands:
            name = words.pop(0)
            command = command.commands[name]
        if hasattr(command, "commands"):
            assert not words, f"{line}: no such command"
            continue
        context = command.make_context(name, list(words))
        assert context.params is not None, line


# -- links ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links, as GitHub does it."""
    found, seen = set(), {}
    for line in CODE.sub("", page.read_text()).splitlines():
        if match := re.match(r"#{1,6} +(.*)", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "").strip().lower()
            name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            count = seen[name] = seen.get(name, -1) + 1
            found.add(f"{name}-{count}" if count else name)
    return found


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `code` [link](x.md), 2nd\n## Twice\n## Twice\n```\n# no heading\n```\n")
    assert anchors(page) == {"a-code-link-2nd", "twice", "twice-1"}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS])
def test_links_lead_somewhere(page):
    """Files exist, below the checkout, and so do the headings that are named; the web is not asked."""
    text, missing = CODE.sub("", read(page)), []
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    )
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        inside = path.is_relative_to(ROOT) and path.exists()
        if not inside or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert not missing


# -- tables and pictures -------------------------------------------------------------------------------------

STALE = f"stale; write it anew by `{recipe_table.COMMAND}`"
QUICK = [case for case in recipe_table.cases() if case[1] in (recipe_table.FLUX[1], recipe_table.SD3[0])]
QUICK += [("wan-radial", recipe_table.WAN[0])]  # the other videos take a minute


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case[0]}-{case[1].where}")
def test_recipes_are_planned_as_the_page_says(case):
    assert recipe_table.page_row(*case) in read("docs/recipes.md").splitlines(), STALE


def test_every_preset_is_on_the_page():
    rows = read("docs/recipes.md").splitlines()
    for recipe, model in recipe_table.cases():
        start = f"| `{recipe}` | {model.title} | {model.where} |"
        assert any(row.startswith(start) for row in rows), f"{start} is missing: {STALE}"


@pytest.fixture
def table(monkeypatch):
    """The rows of one table of the page."""
    monkeypatch.chdir(ROOT)
    return recipe_table.table


def test_the_front_page_shows_the_same(table):
    expected = recipe_table.front_table(table("recipes"), table("shares"))
    assert marked.region(read("README.md"), "recipes") == expected, STALE
    assert marked.region(read("README.md"), "families") == recipe_table.families(table("shares")), STALE


@pytest.mark.slow
@pytest.mark.parametrize("model", [models[0] for models in recipe_table.BY_FAMILY.values()], ids=str)
def test_shares_of_attention(model, table):
    assert recipe_table.shares_row(model) in table("shares"), STALE


def test_pictures_are_small():
    pictures = [
        p for p in (ROOT / "docs").rglob("*") if p.suffix in (".png", ".webp", ".svg", ".jpg", ".gif")
    ]
    assert sum(path.stat().st_size for path in pictures) < 2**20


@pytest.mark.parametrize("page", PAGES)
def test_bundled_models_and_presets_that_are_named_exist(page):
    text = re.sub(r"\]\([^)]*\)|outputs/\S+", "", read(page))
    named = set(re.findall(r"\btiny-(?:flux|sd3|wan|hunyuan-video)[\w-]*", text))
    assert named <= {*INFO, *presets()}


# -- messages ------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """Every text of the source, with … for what is put into it."""
    found = []
    for folder in ("dit_accel", "kernels", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_are_those_of_the_library():
    """What docs/troubleshooting.md quotes in its first columns stands in the code like that."""
    rows = re.findall(r"^\| +(`+)(.+?)\1 +\|", read("docs/troubleshooting.md"), flags=re.MULTILINE)
    source = texts()
    assert len(rows) > 20
    for _, message in rows:
        parts = [re.escape(part) for part in message.strip().split("…")]
        pattern = re.compile(".*".join(parts), flags=re.DOTALL)
        assert any(map(pattern.search, source)), message
