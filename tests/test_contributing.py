"""The examples of docs/adding-*.md are added to a copy of the checkout and run, and cost what is said."""

import difflib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERN = (ROOT / "docs" / "adding-a-pattern.md").read_text()
TEXT = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("adding-*.md")))
# by path: the code blocks that the text says are all of a file
FILES = dict(re.findall(r"all of\s+`([\w/]+\.py)`[^`]*```python\n(.*?)```", TEXT, flags=re.DOTALL))
PATTERNS, BACKENDS = "dit_accel/patterns/__init__.py", "kernels/block_sparse/backends.py"

IN_THE_COPY = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]  # not what finds an editable installation
import dit_accel
assert dit_accel.__file__.startswith(sys.argv[1]), dit_accel.__file__
"""
EACH = """
import json, traceback

def outcome(script):
    try:
        exec(script, {})
    except Exception:
        return traceback.format_exc()

print(json.dumps({name: outcome(script) for name, script in json.loads(sys.argv[2]).items()}))
"""
STATIC = """
import torch
from dit_accel import TokenLayout, attention
from dit_accel.patterns import Staircase
layout = TokenLayout((3, 4, 5), text_len=3)
q, k, v = (torch.randn(1, 2, layout.seq_len, 16) for _ in range(3))
mask = Staircase(rows=1).token_mask(layout)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
torch.testing.assert_close(attention(q, k, v, Staircase(rows=1), layout), expected, atol=1e-5, rtol=1e-5)
assert not mask.all()
"""
ONLINE = """
import torch
from dit_accel import Recipe, TokenLayout, attention
from dit_accel.patterns import NearestMeans
layout = TokenLayout((1, 16, 16), text_len=9)
q, k, v = (torch.randn(2, 3, layout.seq_len, 16) for _ in range(3))
sdpa = torch.nn.functional.scaled_dot_product_attention
close = dict(atol=1e-5, rtol=1e-5)
mask = NearestMeans(0.3).select(q, k, layout, block_size=(32, 16)).to_token_mask()
assert mask.shape == (2, 3, layout.seq_len, layout.seq_len)
assert 0.2 < mask.double().mean() < 0.7 and mask[..., layout.text_slice].all()
torch.testing.assert_close(attention(q, k, v, NearestMeans(1.0), layout), sdpa(q, k, v), **close)
default = NearestMeans(0.5).select(q, k, layout).to_token_mask()
assert Recipe.from_yaml(Recipe(NearestMeans(0.3)).to_yaml()).attention == NearestMeans(0.3)
"""
FAMILY = """
import torch, dit_accel
from dit_accel.patterns import Clear, Dense
from dit_accel.pipelines import family_of
from diffusers import AnyFlowTransformer3DModel
sizes = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16)
sizes |= dict(freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32)
model = AnyFlowTransformer3DModel(**sizes).eval()
inputs = dict(hidden_states=torch.randn(1, 3, 4, 16, 24), encoder_hidden_states=torch.randn(1, 7, 16))
inputs |= dict(timestep=torch.tensor([[900.0, 500.0, 100.0]]), r_timestep=torch.zeros(1, 3))
run = lambda: model(**inputs, return_dict=False)[0]
with torch.no_grad():
    dense = run()
    for radius, same in ((99, True), (2, False)):
        results = []
        for order in ("raster", "hilbert"):
            dit_accel.enable(model, dit_accel.Recipe(Clear(radius), order=order))
            results.append(run())
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        assert torch.allclose(results[0], dense, atol=1e-5) is same
    dit_accel.disable(model)
    assert torch.equal(run(), dense)
assert family_of(model).name == "anyflow"
"""
BACKEND = """
import torch
from dit_accel import TokenLayout, kernels
from dit_accel.patterns import Clear
layout = TokenLayout((1, 12, 12), text_len=5)
mask = Clear(3).block_mask(layout, block_size=(64, 32))
q, k, v = (torch.randn(1, 2, layout.seq_len, 32) for _ in range(3))
attend = kernels.block_sparse_attention
expected = attend(q, k, v, mask, backend="reference")
torch.testing.assert_close(attend(q, k, v, mask, backend="dense"), expected, atol=1e-5, rtol=1e-5)
assert "dense" in {row["backend"] for row in kernels.support_table()}
"""
FORMAT = (
    BACKEND
    + """
coarse = attend(q, k, v, mask, backend="dense", quantization="fp8")
assert 0 < (coarse - expected).abs().max() < 0.5
"""
)


def export(text: str, module: str, name: str) -> str:
    """The package of patterns with one more."""
    exported = f'\nfrom .{module} import {name}\n\n__all__ = [\n    "{name}",\n'
    text = text.replace("\n\n__all__ = [\n", exported)
    assert name in text
    return text


def enlist(text: str) -> str:
    """The registry of backends with one more."""
    text = text.replace("from . import fa4", "from . import dense, fa4")
    return text.replace("    reference.BACKEND,\n", "    reference.BACKEND,\n    dense.BACKEND,\n")


CASES = {  # its file, what changes elsewhere, and a script that uses it
    "static pattern": ("dit_accel/patterns/staircase.py", STATIC),
    "online pattern": ("dit_accel/patterns/nearest_means.py", ONLINE),
    "model family": ("pipelines/families/anyflow.py", FAMILY),
    "kernel backend": ("kernels/block_sparse/dense.py", BACKEND),
    "numeric format": ("kernels/block_sparse/dense.py", FORMAT),
}
EDITS = {
    "static pattern": (PATTERNS, lambda text: export(text, "staircase", "Staircase")),
    "online pattern": (PATTERNS, lambda text: export(text, "nearest_means", "NearestMeans")),
    "kernel backend": (BACKENDS, enlist),
}


def table() -> dict[str, tuple[int, int, int]]:
    """What CONTRIBUTING.md says: by name files, lines in them and lines elsewhere."""
    costs = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| (\d+) \| (\d+)\b", costs, flags=re.MULTILINE)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the code with all examples in it, which runs without being installed."""
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("__pycache__", "results", "weights")
    for name in ("dit_accel", "kernels", "pipelines", "evals", "demos"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path, code in FILES.items():
        assert not (folder / path).exists()
        (folder / path).write_text(code)
    for path, edit in EDITS.values():
        (folder / path).write_text(edit((folder / path).read_text()))
    return folder


@pytest.fixture(scope="module")
def outcomes(checkout) -> dict[str, str | None]:
    """By example what went wrong, all of them in one process: most of the time it imports."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    scripts = json.dumps({name: script for name, (_, script) in CASES.items()})
    command = [sys.executable, "-c", IN_THE_COPY + EACH, str(checkout), scripts]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_an_example_runs_as_a_new_file(outcomes, name):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_what_it_costs(name):
    code = FILES[CASES[name][0]]
    if name == "numeric format":
        counted = (0, len(re.findall(r".*(?:fp8|float8).*", code)), 0)
    else:
        path, edit = EDITS.get(name, (PATTERNS, str))
        before = (ROOT / path).read_text()
        changes = difflib.ndiff(before.splitlines(), edit(before).splitlines())
        counted = (1, len(code.splitlines()), sum(line.startswith("+ ") for line in changes))
    assert table()[name] == counted


def test_the_table_names_what_is_tested():
    assert list(table()) == list(CASES)
    assert {path for path, _ in CASES.values()} == set(FILES)


def test_the_pattern_is_exact_under_every_order():
    """The snippet that follows the static pattern."""
    blocks = re.findall(r"```python\n(.*?)```", PATTERN, flags=re.DOTALL)
    namespace = {}
    for block in blocks[:2]:
        exec(compile(block, "adding-a-pattern.md", "exec"), namespace)
    with pytest.raises(ValueError, match="got -1"):
        namespace["Staircase"](rows=-1)
