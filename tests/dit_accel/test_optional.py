"""The library without what only the command line needs: it works, and what does not says what to install."""

import subprocess
import sys

import pytest

EVERYTHING = ("typer", "rich", "imageio", "imageio_ffmpeg", "skimage")


def run(code: str, *blocked: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that does not have these packages."""
    block = f"import sys\nsys.modules |= dict.fromkeys({blocked!r})\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)


def test_the_library_works_without_them(tmp_path):
    code = f"""
import dit_accel, torch
from dit_accel import media
from dit_accel.generation import Request, execute, load
from dit_accel.guidance import HeadHunter
from dit_accel.planning.plan import plan

pipe = load("tiny-flux", torch.float32, torch.device("cpu"))
dit_accel.enable(pipe, "tiny-flux-clear")
request = Request("a red circle", 256, 256, None, 1).with_defaults("tiny-flux", "native")
media.save({str(tmp_path / "circle.png")!r}, execute(pipe, request, None).frames)
print(dit_accel.summary(pipe))
dit_accel.disable(pipe)
print(plan("tiny-flux-clear", model="tiny-flux").density)
"""
    done = run(code, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert "Clear(radius=12)" in done.stdout
    assert (tmp_path / "circle.png").is_file()


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("media.save(path, np.zeros((2, 16, 16, 3), np.uint8))", "imageio"),
        ("media.save(path, np.zeros((2, 16, 16, 3), np.uint8))", "imageio_ffmpeg"),
        ("path.write_bytes(bytes(4) + b'ftypisom' + bytes(64)); media.load(path)", "imageio_ffmpeg"),
    ],
    ids=["writing", "writing-without-ffmpeg", "reading"],
)
def test_mp4_names_what_is_missing(tmp_path, code, missing):
    imports = "import numpy as np\nfrom pathlib import Path\nfrom dit_accel import media\n"
    done = run(f"{imports}path = Path({str(tmp_path / 'a.mp4')!r})\n{code}", missing)
    last = done.stderr.strip().splitlines()[-1]
    assert f"MP4 needs {missing}, which is not installed: pip install 'dit-accel[cli]'" in last


def test_ssim_names_what_is_missing():
    code = """
import numpy as np
from dit_accel.evals.metrics.fidelity import ssim
ssim(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8))
"""
    assert (
        "SSIM needs skimage, which is not installed: pip install 'dit-accel[cli]'"
        in run(code, "skimage").stderr
    )


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_names_what_is_missing_in_one_line(missing):
    done = run("from dit_accel.__main__ import main\nmain()", missing)
    assert done.returncode == 3
    message = f"the command line needs {missing}, which is not installed: pip install 'dit-accel[cli]'"
    assert done.stderr.strip().splitlines() == [f"error: {message}"]
