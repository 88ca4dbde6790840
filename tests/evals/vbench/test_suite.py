"""VBench's prompts and file names, what is missing or damaged, and a stand-in for an installed VBench."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel import media
from dit_accel.errors import UnavailableError
from dit_accel.evals.vbench.suite import (
    Installed,
    Prompt,
    by_dimension,
    damage,
    find,
    read_prompts,
    result_file,
)
from dit_accel.files import atomic

FULL_INFO = [
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a park", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "a red car", "dimension": ["object_class"]},
]
SCRIPT = """
import json, os, pathlib, sys
options = dict(part.split("=", 1) for part in sys.argv[1:] if "=" in part)
dimension = sys.argv[-1]
print("vbench says", dimension)
output = pathlib.Path(options["--output_path"])
behaviour = pathlib.Path(__file__).with_name("behaviour")
how = behaviour.read_text() if behaviour.exists() else "well"
(output / "results_0_full_info.json").write_text("[]")
if how == "fails":
    (output / "results_0_eval_results.json").write_text('{"half')
    sys.exit(7)
if how == "well":
    names = sorted(os.listdir(options["--videos_path"]))
    rows = [{"video_path": name, "video_results": 0.5} for name in names]
    (output / "results_0_eval_results.json").write_text(json.dumps({dimension: [0.5, rows]}))
"""


def fake_vbench(folder: Path) -> Path:
    """An interpreter that has a `vbench`; what it writes is made up."""
    package = folder / "site" / "vbench"
    (package / "launch").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('looked up, never imported')")
    (package / "launch" / "evaluate.py").write_text(SCRIPT)
    (package / "VBench_full_info.json").write_text(json.dumps(FULL_INFO))
    details = folder / "site" / "vbench-0.1.5.dist-info"
    details.mkdir()
    (details / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/site" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def video(tmp_path) -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return media.save(tmp_path / "source" / "video.mp4", frames).read_bytes()


# -- prompts -------------------------------------------------------------------------------------------------


def test_full_info_is_read_and_each_text_is_one_prompt(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(FULL_INFO))
    prompts = read_prompts(tmp_path / "info.json")
    assert [(one.text, one.dimensions) for one in prompts] == [
        ("a still lake", ("temporal_flickering",)),
        ("a red car", ("color", "object_class")),
        ("a park", ("scene", "background_consistency")),
    ]
    groups = by_dimension(prompts)
    assert list(groups) == ["background_consistency", "temporal_flickering", "object_class", "color", "scene"]
    assert groups["color"] == groups["object_class"] == [prompts[1]]
    kept = read_prompts(tmp_path / "info.json", ["scene", "color"])
    assert [(one.text, one.dimensions) for one in kept] == [("a red car", ("color",)), ("a park", ("scene",))]


def test_plain_lines_are_for_the_dimensions_that_are_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cat\n")
    assert read_prompts(path) == [Prompt("a cat"), Prompt("a dog")]
    assert by_dimension(read_prompts(path)) == {"": [Prompt("a cat"), Prompt("a dog")]}
    assert read_prompts(path, ["color"])[1] == Prompt("a dog", ("color",))


def test_there_are_5_videos_and_25_for_flickering():
    assert Prompt("a cat").names() == [f"a cat-{index}.mp4" for index in range(5)]
    assert len(Prompt("a cat", ("color", "temporal_flickering")).names()) == 25
    assert Prompt("a cat", ("temporal_flickering",)).names(2) == ["a cat-0.mp4", "a cat-1.mp4"]


def test_bad_prompts_are_refused(tmp_path):
    info, lines = tmp_path / "info.json", tmp_path / "prompts.txt"
    for content, reason in (
        ("[", "cannot be read"),
        ("{}", "not VBench's full-info JSON"),
        ('["a cat"]', "not VBench's full-info JSON"),
        ('[{"prompt_en": "a cat"}]', "not VBench's full-info JSON"),
        ('[{"prompt_en": 3, "dimension": ["color"]}]', "not VBench's full-info JSON"),
        ('[{"prompt_en": "a cat", "dimension": ["Physics"]}]', "Physics: not among VBench's dimensions"),
        ("[]", "holds no prompts"),
    ):
        info.write_text(content)
        with pytest.raises(ValueError, match=reason):
            read_prompts(info)
    info.write_text(json.dumps(FULL_INFO))
    with pytest.raises(ValueError, match="holds no prompts for human_action"):
        read_prompts(info, ["human_action"])
    for content, reason in (("\n", "is empty"), ("24/7", "a slash"), ("a" * 231, "230 bytes")):
        lines.write_text(content)
        with pytest.raises(ValueError, match=reason):
            read_prompts(lines)
    with pytest.raises(ValueError, match=r"there is no file .*none\.txt"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["prompts.txt", "info.json"])
def test_a_byte_order_mark_is_no_part_of_a_file_name(tmp_path, name):
    text = "a cat\r\na dog" if name == "prompts.txt" else json.dumps(FULL_INFO)
    (tmp_path / name).write_text(text, encoding="utf-8")
    plain = read_prompts(tmp_path / name)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_prompts(tmp_path / name) == plain
    (tmp_path / name).write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 but UTF-16"):
        read_prompts(tmp_path / name)


def test_the_longest_prompt_can_be_written(tmp_path, video):
    path = tmp_path / Prompt("ä" * 115, ("temporal_flickering",)).names()[-1]
    with atomic(path) as temporary:
        temporary.write_bytes(video)
    assert path.exists()


# -- videos --------------------------------------------------------------------------------------------------


def test_damaged_videos_are_found_without_decoding(tmp_path, video):
    path = tmp_path / "a.mp4"
    for content, reason in (
        (video, None),
        (b"", "empty"),
        (video[:-1], "cut off"),
        (video[: len(video) // 2], "cut off"),
        (video[:5], "no MP4"),
        (b"not a video at all", "no MP4"),
        (video[: int.from_bytes(video[:4], "big")], "cut off"),  # its first box, whole
    ):
        path.write_bytes(content)
        assert damage(path) == reason


def test_what_is_missing_is_counted_and_named(tmp_path, video):
    prompts = [Prompt("a cat", ("color",)), Prompt("a lake", ("temporal_flickering",))]
    folder = tmp_path / "videos"
    nothing = find(folder, prompts)
    assert (len(nothing.missing), nothing.complete) == (30, False)
    folder.mkdir()
    for name in ("a cat-0.mp4", "a lake-24.mp4", "a cat-5.mp4"):
        (folder / name).write_bytes(video)
    (folder / "a cat-1.mp4").touch()
    (folder / ".a cat-2-x.mp4").touch()
    (folder / "notes.txt").touch()
    found = find(folder, prompts)
    assert found.whole == ("a cat-0.mp4", "a lake-24.mp4")
    assert found.damaged == {"a cat-1.mp4": "empty"}
    assert found.foreign == ("a cat-5.mp4", "notes.txt")
    cat = found.of(prompts[0].names())
    assert (cat.whole, cat.missing) == (("a cat-0.mp4",), ("a cat-2.mp4", "a cat-3.mp4", "a cat-4.mp4"))
    expected = "27 missing: a cat-2.mp4, a cat-3.mp4 and 25 more; 1 damaged: a cat-1.mp4"
    assert found.describe(shown=2) == expected
    assert find(folder, prompts[:1], samples=1).complete
    with pytest.raises(ValueError, match="is a file"):
        find(folder / "notes.txt", prompts)


# -- VBench itself -------------------------------------------------------------------------------------------


def test_an_installed_vbench_is_found_without_importing_it(tmp_path):
    tool = Installed.find(str(fake_vbench(tmp_path)))
    assert tool.folder == tmp_path / "site" / "vbench"
    assert tool.version == "0.1.5"
    assert len(read_prompts(tool.full_info)) == 3
    with pytest.raises(UnavailableError, match=r"there is no interpreter .*none"):
        Installed.find(str(tmp_path / "none"))
    (tool.folder / "__init__.py").unlink()
    with pytest.raises(UnavailableError, match="has no vbench: pip install vbench in an environment"):
        Installed.find(tool.python)


def test_the_command_is_a_list_for_one_gpu_or_several(tmp_path):
    tool = Installed("python", tmp_path)
    paths = (Path("my videos"), "color", Path("out"), Path("info.json"))
    with pytest.raises(UnavailableError, match=r"has no launch/evaluate\.py"):
        tool.command(*paths)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "evaluate.py").touch()
    one = tool.command(*paths)
    assert one[:3] == ["python", str(tmp_path / "launch" / "evaluate.py"), "--videos_path=my videos"]
    assert one[-3:] == ["--mode=vbench_standard", "--dimension", "color"]
    four = tool.command(*paths, gpus=4, custom=True)
    assert four[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert "--mode=custom_input" in four


def test_results_appear_when_vbench_has_ended_well(tmp_path):
    tool = Installed.find(str(fake_vbench(tmp_path)))
    videos, output = tmp_path / "my videos; rm -rf $HOME", tmp_path / "new" / "output"
    videos.mkdir()
    (videos / "a-0.mp4").touch()
    path = tool.evaluate(videos, "color", output, tool.full_info)
    assert path == result_file(output, "color") == output / "color_eval_results.json"
    assert json.loads(path.read_text()) == {
        "color": [0.5, [{"video_path": "a-0.mp4", "video_results": 0.5}]],
    }
    assert list(output.iterdir()) == [path]
    for how, reason in (
        ("fails", "vbench ended with exit code 7 in scene"),
        ("silent", "vbench ended well but wrote 0 results of scene"),
    ):
        (tool.folder / "launch" / "behaviour").write_text(how)
        with pytest.raises(ValueError, match=reason):
            tool.evaluate(videos, "scene", output, tool.full_info)
        assert list(output.iterdir()) == [path]
