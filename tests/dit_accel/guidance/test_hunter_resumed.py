"""HeadHunter: searches that were stopped and go on, and one in two processes."""

import json
from pathlib import Path

import processes
import pytest
from painted_heads import PAIRS, darkness, draw, hunter, level

from dit_accel.guidance import HeadHunter

ROOT = Path(__file__).parents[3]


class Stops:
    """An objective after whose n-th batch the machine is switched off."""

    name = "level"

    def __init__(self, after):
        self.left = after

    def __call__(self, images, prompts):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return level(images, prompts)


class TestResume:
    @pytest.mark.parametrize("after", [0, 1, 5, 12])
    def test_stopped_and_resumed_is_as_never_stopped(self, flux, tmp_path, after):
        whole, first, second = [], [], []
        options = {"pairs": [*PAIRS, ("a", 2)], "batch": 2}
        expected = hunter(flux, tmp_path / "whole", seen=whole, **options).run()
        with pytest.raises(KeyboardInterrupt):
            hunter(flux, tmp_path / "parts", Stops(after), seen=first, **options).run()
        found = hunter(flux, tmp_path / "parts", seen=second, **options).run(resume=True)
        assert found == expected
        for name in ("log.json", "heads.json"):
            assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
        assert first + second == whole  # nothing is generated twice

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "3",
            "{}",
            '{"scores": null}',
            '{"scores": {"level": "1"}}',
            '{"scores": {"level": NaN}}',
        ],
    )
    def test_a_damaged_record_is_named(self, flux, tmp_path, content):
        hunter(flux, tmp_path).run()
        record = sorted(tmp_path.rglob("samples/*.json"))[3]
        whole = record.read_text()
        record.write_text(content)
        with pytest.raises(ValueError, match=r"the kept scores .* are damaged .*; delete them") as error:
            hunter(flux, tmp_path).run(resume=True)
        assert str(record) in str(error.value)
        record.unlink()
        hunter(flux, tmp_path).run(resume=True)
        assert json.loads(record.read_text()) == json.loads(whole)

    @pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
    def test_a_damaged_image_is_named(self, flux, tmp_path, content):
        hunter(flux, tmp_path).run()
        record = sorted(tmp_path.rglob("samples/*.json"))[3]
        record.with_suffix(".png").write_bytes(content)
        record.unlink()  # its batch is scored again, from the images
        with pytest.raises(ValueError, match=r"the kept image .* is damaged .*; delete it") as error:
            hunter(flux, tmp_path).run(resume=True)
        assert str(record.with_suffix(".png")) in str(error.value)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}', "{}"])
    def test_a_damaged_log_is_named(self, flux, tmp_path, content):
        hunter(flux, tmp_path).run()
        (tmp_path / "log.json").write_text(content)
        with pytest.raises(ValueError, match=r"log\.json (cannot be read as|is not) the log of a search"):
            hunter(flux, tmp_path).run(resume=True)

    def test_a_longer_search_goes_on_from_a_shorter(self, flux, tmp_path):
        seen = []
        hunter(flux, tmp_path / "short", rounds=1).run()
        found = hunter(flux, tmp_path / "short", seen=seen).run(resume=True)
        assert found == hunter(flux, tmp_path / "long").run()
        assert all(len(heads) > 2 for heads, _ in seen)

    def test_an_earlier_search_is_not_overwritten(self, flux, tmp_path):
        hunter(flux, tmp_path).run()
        log = (tmp_path / "log.json").read_text()
        with pytest.raises(ValueError, match=r"log\.json is of an earlier search; resume it"):
            hunter(flux, tmp_path).run()
        changes = {
            "call": {"call": {"base": 60}},
            "pairs": {"pairs": [("a", 0)]},
            "top_k": {"top_k": 3},
            "perturbation": {"perturbation": {"strength": 0.5}},
            "objective": {"objective": darkness},
            "floors": {"floors": [(level, 1)]},
            "searched": {"heads": [(0, 0)]},
            "batch": {"batch": 1},
        }
        for key, change in changes.items():
            with pytest.raises(ValueError, match=f"a search with another `{key}`"):
                hunter(flux, tmp_path, **change).run(resume=True)
        assert (tmp_path / "log.json").read_text() == log


SCRIPT = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)
tests, out = sys.argv[1:]
sys.path.insert(0, f"{tests}/helpers")
from accelerate import PartialState
from dit_accel.guidance import HeadHunter
from image_pipelines import make_flux, run_flux
from painted_heads import PAIRS, darkness, draw, level
def generate(pipe, prompts, seeds):
    return draw(run_flux, pipe, prompts, seeds)
count = []
def search(rounds):
    options = {"top_k": 2, "batch": 1, "generate": generate}
    search = HeadHunter(make_flux(), level, PAIRS, out, rounds=rounds, **options)
    score = search.trials.score
    search.trials.score = lambda guidance, pairs: count.append(pairs) or score(guidance, pairs)
    return search
search(1).run()  # stopped after a round
count.clear()
found = search(2).run(resume=True)
state = PartialState()
result = {"processes": state.num_processes, "share": len(count), "heads": found.heads}
pathlib.Path(out, f"result-{state.process_index}.json").write_text(json.dumps(result))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(flux, tmp_path):
    """Two CPU processes that go on after a round: log and images are those of one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    processes.launch(tmp_path, tmp_path / "script.py", ROOT / "tests", tmp_path / "two")

    def generate(pipe, prompts, seeds):
        return draw(flux.run, pipe, prompts, seeds)

    one = HeadHunter(flux.pipe, level, PAIRS, tmp_path / "one", rounds=2, top_k=2, batch=1, generate=generate)
    found = one.run()
    results = [json.loads((tmp_path / "two" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["processes"] for result in results] == [2, 2]
    assert all(result["heads"] == json.loads(json.dumps(found.heads)) for result in results)
    shares = [result["share"] for result in results]
    assert sum(shares) == 2 * (1 + 8 + 1 + 6 + 1)
    assert max(shares) - min(shares) <= 5
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    assert all(log["settings"].pop("generate") for log in logs)  # where the two are defined
    assert logs[0] == logs[1]
