"""Dependencies point down: no circle of imports, and every package imports only its own and lower layers."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dit_accel", "kernels", "pipelines", "evals", "demos")
LAYERS = (  # the longest entry that a module's name begins with is its own; "" is `dit_accel` itself
    "arguments bounded_dict cache_folder checkout environment errors files gif_frames json_files "
    "latents layer_names media optional plots seeds tensor_files training_loop",
    "masks",
    "kernels",
    "attention",
    "patterns",
    "recipe guidance.perturbation",
    "pipelines.families",
    "guidance.branch",
    "runtime",
    "summary calibration distillation guidance.perturbed_model",
    "",
    "pipelines",
    "scorers generation",
    "guidance highres planning parallel",
    "evals",
    "cli demos",
    "__main__",
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split() or [""]}


def modules(root: Path) -> dict[str, Path]:
    """Files by module, named as below `dit_accel`: `masks.layout`, `evals.metrics`; "" is the top."""
    found = {}
    for folder in FOLDERS:
        for file in (root / folder).rglob("*.py"):
            parts = list(file.relative_to(root / folder if folder == "dit_accel" else root).parts)
            parts[-1] = parts[-1].removesuffix(".py")
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, those in functions too if `lazy`, but not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(ast.Module([other], []), lazy)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from statements(child, lazy)


def imported(name: str, file: Path, known: dict[str, Path], lazy: bool = True) -> set[str]:
    """The modules that one imports, by the names they are written with."""
    package = name.split(".") if file.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in statements(ast.parse(file.read_text()), lazy):
        for alias in node.names:
            if isinstance(node, ast.Import):
                path = alias.name
            elif node.level:
                above = ["dit_accel", *package][: len(package) + 2 - node.level]
                path = ".".join([*above, *filter(None, [node.module]), alias.name])
            else:
                path = f"{node.module}.{alias.name}"
            head, *rest = path.split(".")
            if head != "dit_accel":
                continue
            full, short = ".".join(rest), ".".join(rest[:-1])
            found.add(full if full in known else short)
    return found - {name}


def graph(root: Path) -> dict[str, set[str]]:
    """Which modules each module imports."""
    known = modules(root)
    return {name: imported(name, file, known) for name, file in known.items()}


def packages(name: str) -> set[str]:
    """The packages that a module is in, `dit_accel` itself left out."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def graph_at_import(root: Path) -> dict[str, set[str]]:
    """Which modules run before each module: what it imports outside functions, and their packages."""
    known = modules(root)
    found = {}
    for name, file in known.items():
        direct = imported(name, file, known, lazy=False)
        found[name] = direct | set().union(*map(packages, direct)) - packages(name) - {name}
    return found


def defined(file: Path) -> set[str]:
    """Names that a module binds outside functions and classes, and `*` if it makes others when asked."""
    names: set[str] = set()
    nodes = list(ast.parse(file.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add("*" if node.name == "__getattr__" else node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            stored = (one for one in ast.walk(node) if isinstance(one, ast.Name))
            names |= {one.id for one in stored if isinstance(one.ctx, ast.Store)}
            nodes += [
                one for one in ast.iter_child_nodes(node) if isinstance(one, (ast.stmt, ast.excepthandler))
            ]
    return names


def unknown_names(root: Path) -> list[str]:
    """Names that are imported from a module of ours that does not have them, in functions too."""
    known, found = modules(root), []
    for name, file in known.items():
        package = name.split(".") if file.name == "__init__.py" and name else name.split(".")[:-1]
        for node in statements(ast.parse(file.read_text()), lazy=True):
            if isinstance(node, ast.ImportFrom):
                above = ["dit_accel", *package][: len(package) + 2 - node.level] if node.level else []
                head, _, short = ".".join([*above, *filter(None, [node.module])]).partition(".")
                if head == "dit_accel":
                    there = defined(known[short]) if short in known else set()
                    named = {alias.name for alias in node.names}
                    missing = {n for n in named if f"{short}.{n}".strip(".") not in known} - there
                    found += [f"{name} imports {n} of {short}" for n in missing if "*" not in there]
    return found


def level(name: str) -> int:
    """The layer of a module, counted from the bottom."""
    parts = name.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(LEVELS[one] for one in names if one in LEVELS)


def faults(root: Path) -> list[str]:
    """Imports that point up, and circles."""
    written = graph(root)
    found = [f"{a} imports {b}" for a, bs in written.items() for b in sorted(bs) if level(b) > level(a)]
    for imports in (written, graph_at_import(root)):
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            circle = error.args[1][:-1]
            first = circle.index(min(circle))
            found.append(f"a circle: {' <- '.join(circle[first:] + circle[:first])}")
    return found


def test_dependencies_point_down_without_circles():
    imports = graph(ROOT)
    assert len(imports) > 150
    assert "masks.layout" in imports["patterns.base"]
    assert not faults(ROOT)


@pytest.mark.parametrize(
    ("place", "text", "fault"),
    [
        ("dit_accel/masks/layout.py", "from dit_accel import kernels", "masks.layout imports kernels"),
        ("dit_accel/files.py", "def f():\n    from .masks import layout", "files imports masks.layout"),
        ("kernels/op.py", "import dit_accel.evals.table", "kernels.op imports evals.table"),
        ("dit_accel/masks/order.py", "from . import layout", "a circle: masks.layout <- masks.order"),
        (
            "dit_accel/recipe/__init__.py",
            "from .files import read",
            "a circle: guidance.perturbation <- recipe.files <- recipe",
        ),
    ],
)
def test_faults_are_found(tmp_path, place, text, fault):
    files = {
        "dit_accel/masks/layout.py": "def f():\n    from .order import x",
        "dit_accel/masks/order.py": "",
        "kernels/__init__.py": "",
        "dit_accel/recipe/names.py": "",
        "dit_accel/recipe/files.py": "from dit_accel.guidance.perturbation import Heads",
        "dit_accel/guidance/perturbation.py": "from dit_accel.recipe.names import flat",
        "evals/table.py": "from dit_accel.masks import layout",
    }
    for name, content in {**files, place: text}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert any(one.startswith(fault) for one in faults(tmp_path)), faults(tmp_path)


def test_imported_names_exist(tmp_path):
    assert not unknown_names(ROOT)
    (tmp_path / "dit_accel").mkdir()
    (tmp_path / "dit_accel" / "files.py").write_text("if True:\n    read = 1\n")
    text = "def f():\n    from dit_accel.files import read, write\n"
    (tmp_path / "dit_accel" / "media.py").write_text(text)
    assert unknown_names(tmp_path) == ["media imports write of files"]


def test_only_type_checkers_may_look_up(tmp_path):
    (tmp_path / "dit_accel").mkdir()
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "table.py").write_text("")
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dit_accel.evals import table\n"
    (tmp_path / "dit_accel" / "files.py").write_text(text)
    assert not faults(tmp_path)


def test_the_drawing_shows_the_layers():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)[1].splitlines()
    rooms = [set(re.split(r"  +", line)[0].split(", ")) for line in drawn]
    layers = [set(names.split() or ["dit_accel"]) for names in reversed(LAYERS)]
    assert rooms[:-1] == layers[:-1]
    assert rooms[-1] - {"..."} < layers[-1]
