"""What is installed and how: the layout of the checkout, the wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dit_accel", "kernels", "pipelines", "demos", "evals")


def python(code: str, cwd: Path, *paths: Path) -> str:
    """Runs code in a fresh interpreter as `python -c` does, with the current directory first on the path."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_are_declared():
    """Every folder with an `__init__.py` is installed, and under `dit_accel` only."""
    declared = set(
        re.findall(r'^  "(dit_accel[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    )
    folders = [
        file.parent.relative_to(ROOT) for top in PACKAGES for file in (ROOT / top).rglob("__init__.py")
    ]
    names = {".".join(folder.parts) for folder in folders}
    assert declared == {name if name.startswith("dit_accel") else f"dit_accel.{name}" for name in names}


@pytest.mark.parametrize("installed", [False, True], ids=["without-hf-kernels", "with-hf-kernels"])
def test_top_level_kernels_folder_hides_nothing(tmp_path, installed):
    """Started in the checkout, `kernels` means Hugging Face's package or nothing that breaks others."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(
            "from .layer import get_kernel\n__version__ = '0.99'\n"
        )
        (tmp_path / "kernels" / "layer.py").write_text("def get_kernel(name):\n    return name\n")
    code = """
import dit_accel.kernels, diffusers, transformers
from diffusers import FluxPipeline, WanPipeline
from transformers.utils import is_kernels_available
is_kernels_available()
import transformers.integrations.hub_kernels
assert dit_accel.kernels.block_sparse_attention
"""
    if installed:
        code += "from kernels import get_kernel\nimport kernels.layer\nassert get_kernel('x') == 'x'\n"
    python(code, ROOT, tmp_path)


def test_import_needs_neither_gpu_nor_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    python("import dit_accel, dit_accel.kernels, dit_accel.pipelines, dit_accel.cli", tmp_path, tmp_path)


@pytest.mark.slow
def test_wheel_holds_code_recipes_and_weights(tmp_path):
    """Built from a copy to keep the checkout clean, and without isolation so that nothing is downloaded."""
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for top in PACKAGES:
        shutil.copytree(ROOT / top, source / top, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("dit_accel-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dit_accel"}
    assert "dit_accel/py.typed" in names
    for file in (ROOT / "dit_accel").rglob("*.yaml"):
        assert f"dit_accel/recipe/presets/{file.name}" in names
    weights = ROOT / "pipelines" / "tiny" / "weights"
    for file in weights.rglob("*"):
        if file.is_file():
            assert f"dit_accel/pipelines/tiny/weights/{file.relative_to(weights).as_posix()}" in names
    for pattern in (
        "dit_accel/scorers/weights/*.safetensors",
        "evals/vbench/constants.json",
        "pipelines/tiny/sprites.png",
        "pipelines/families/published/*.json",
        "dit_accel/runtime/speed_tables/*.json",
    ):
        files = [file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern)]
        assert files, pattern
        assert {file if file.startswith("dit_accel/") else f"dit_accel/{file}" for file in files} <= set(
            names
        )
    for top in PACKAGES:
        for file in (ROOT / top).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            assert (name if top == "dit_accel" else f"dit_accel/{name}") in names
