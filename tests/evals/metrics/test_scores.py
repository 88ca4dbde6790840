"""Scores of single files: tiny random CLIP models, and stand-ins for two packages (see `score_packages`)."""

import sys

import numpy as np
import pytest
import score_packages
import torch
from tiny_clip import save_aesthetics, save_clip

from dit_accel import media
from dit_accel.errors import UnavailableError
from dit_accel.evals.metrics.catalogue import METRICS
from dit_accel.evals.metrics.folders import Folder, Store, choose
from dit_accel.evals.metrics.scores import Ready, check, cut_warnings, measure, prepare, summarise
from dit_accel.guidance.objectives import named
from dit_accel.scorers.pretrained import BERT, SCORERS, Sources

CPU = torch.device("cpu")
NAMES = ["clip", "pickscore", "hpsv2", "aesthetics"]


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder for `--weights`: different networks where the published ones would be."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("clip-vit-large-patch14", "PickScore_v1", "HPSv2-hf")):
        save_clip(folder / name, seed)
    processor = save_clip(folder / "CLIP-ViT-H-14-laion2B-s32B-b79K", 3)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "PickScore_v1" / name).unlink()  # as published, these are CLIP ViT-H/14's
        assert (processor / name).is_file()
    aesthetics = folder / "aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    save_aesthetics(aesthetics, folder / "clip-vit-large-patch14")
    (aesthetics / "preprocessor_config.json").unlink()
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two pictures of other sizes than the networks', and a video of 19 frames."""
    generator = np.random.default_rng(0)
    for name, shape in (("a.png", (1, 24, 32)), ("b.png", (1, 16, 16)), ("c.gif", (19, 20, 20))):
        frames = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        media.save(tmp_path / "test" / name, frames)
    return Folder.open(tmp_path / "test")


PROMPTS = {"a.png": "a red circle", "b.png": "a blue circle", "c.gif": "a circle"}


@pytest.mark.parametrize("frames", ["all", "3"])
def test_scores_are_the_scorers_mean_over_all_chosen_frames(weights, folder, frames, tmp_path):
    """Those of the guidance, a frame at a time; they look at up to 8 frames, here all 19 count."""
    rows = measure(folder, prepare(NAMES, Sources(weights), CPU), PROMPTS, frames=frames)
    whole = {}
    for name in NAMES:
        parts = SCORERS[name]
        whole[name] = tmp_path / name
        whole[name].mkdir()
        for part in reversed(parts):  # weights last: their config.json is the model's
            for file in (weights / part.repository.split("/")[-1]).iterdir():
                (whole[name] / file.name).write_bytes(file.read_bytes())
    for row in rows:
        shown = choose(media.load(folder.path / row["name"]), frames).astype(np.float32) / 255
        for name in NAMES:
            scorer = named(f"{name}:{whole[name]}")
            each = [scorer(frame[None], [PROMPTS[row["name"]]])[0] for frame in shown]
            assert row[name] == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5)
    values = np.array([[row[name] for name in NAMES] for row in rows])
    assert len(np.unique(values.round(6))) == values.size, "every network and every file scores otherwise"
    assert [(row["name"], row["prompt"]) for row in rows] == list(PROMPTS.items())


def test_the_prompt_counts_where_it_should(weights, folder):
    ready = prepare(NAMES, Sources(weights), CPU)
    rows, other = (measure(folder, ready, {**PROMPTS, "a.png": text}) for text in ("a red circle", "blue"))
    for name in NAMES:
        assert (rows[0][name] != other[0][name]) == METRICS[name].prompt
        assert rows[1][name] == other[1][name]
    with pytest.raises(ValueError, match=r"c\.gif: clip judges by the prompt, and there is none"):
        measure(folder, ready, {"a.png": "a", "b.png": "a"})


def test_results_are_kept_by_content_prompt_and_weights(weights, folder, tmp_path):
    store = Store(tmp_path / "kept")
    ready = prepare(["clip", "aesthetics"], Sources(weights), CPU)
    rows = measure(folder, ready, PROMPTS, store=store)

    def fail(frames, prompt):
        raise AssertionError("computed again")

    kept = {name: Ready(fail, one.settings) for name, one in ready.items()}
    assert measure(folder, kept, PROMPTS, store=store) == rows
    changed = {**PROMPTS, "a.png": "blue"}
    with pytest.raises(AssertionError, match="computed again"):
        measure(folder, kept, changed, store=store)
    only = {"aesthetics": kept["aesthetics"]}
    assert measure(folder, only, changed, store=store)[0]["aesthetics"] == rows[0]["aesthetics"]
    settings = prepare(["pickscore"], Sources(weights), CPU)["pickscore"].settings
    with pytest.raises(AssertionError, match="computed again"):
        measure(folder, {"clip": Ready(fail, settings)}, PROMPTS, store=store)


def test_the_summary_is_the_mean_with_its_interval():
    values = np.random.default_rng(0).normal(20, 1, 50)
    rows = [{"name": str(i), "clip": value} for i, value in enumerate(values)]
    ready = {"clip": Ready(lambda *_: 0.0, {"backbone": "x"})}
    found = summarise(rows, ready)["clip"]
    assert found["value"] == pytest.approx(values.mean())
    low, high = found["interval"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.1)
    assert low < found["value"] < high
    assert (found["lowest"], found["highest"], found["files"]) == (values.min(), values.max(), 50)
    assert summarise(rows[:1], ready)["clip"]["interval"] is None


def test_prompts_that_are_cut_are_warned_of(weights):
    """8 tokens with the two at the ends."""
    ready = prepare(["clip", "aesthetics"], Sources(weights), CPU)
    fits, cut = "a red circle a red circle", "a red circle a red circle a"
    assert cut_warnings(ready, {"a.png": fits}) == []
    assert cut_warnings(ready, {"a.png": fits, "b.png": cut, "c.png": cut}) == [
        "clip read the first 8 tokens of 1 longer prompts"
    ]


def test_a_score_that_is_not_finite_is_an_error(folder):
    ready = {"topiq": Ready(lambda *_: float("nan"), {})}
    with pytest.raises(ValueError, match=r"a\.png: topiq gave nan, which is no score"):
        measure(folder, ready, {})


def test_unreadable_files_are_found_beforehand(folder):
    check(folder, "all")
    (folder.path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        check(folder, "all")


# -- what is missing -----------------------------------------------------------------------------------------


def test_every_repository_that_is_missing_is_named(tmp_path, weights):
    for name, parts in (("clip", 1), ("pickscore", 2), ("hpsv2", 1), ("aesthetics", 2)):
        reason = METRICS[name].missing(Sources(tmp_path))
        assert reason.count("is not in the Hugging Face cache") == parts, name
        assert METRICS[name].missing(Sources(weights)) is None
        assert METRICS[name].missing(Sources(tmp_path, download=True)) is None
        with pytest.raises(UnavailableError, match="is not in the Hugging Face cache"):
            prepare([name], Sources(tmp_path), CPU)
    save_clip(tmp_path / "clip-vit-large-patch14")
    assert METRICS["clip"].missing(Sources(tmp_path)) is None
    for file in (tmp_path / "clip-vit-large-patch14").glob("tokenizer*"):
        file.unlink()
    assert "tokenizer.json or vocab.json into clip-vit-large-patch14/" in METRICS["clip"].missing(
        Sources(tmp_path)
    )


def test_weights_that_lack_some_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_clip(tmp_path / "clip-vit-large-patch14")
    path = tmp_path / "clip-vit-large-patch14" / "model.safetensors"
    state = load_file(path)
    del state["logit_scale"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UnavailableError, match="cannot be loaded: the weights lack logit_scale"):
        prepare(["clip"], Sources(tmp_path), CPU)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("image-reward", "ImageReward", "image-reward git+https://github.com/openai/CLIP 'transformers<5'"),
        ("topiq", "pyiqa", "pyiqa"),
    ],
)
def test_packages_say_how_they_are_installed(name, package, install, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert METRICS[name].missing(Sources()) == f"{package} is not installed: pip install {install}"
    (tmp_path / f"{package}.py").write_text("from transformers import no_such_thing")
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.syspath_prepend(tmp_path)
    reason = METRICS[name].missing(Sources())
    assert reason.startswith(f"{package} cannot be imported (cannot import name 'no_such_thing'")
    assert reason.endswith(f": pip install {install}")


# -- the packages --------------------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """The stand-ins, their weights in `Sources`, and the tokenizer in the cache."""
    import huggingface_hub

    def cached(repository, name):
        return str(tmp_path / name) if (repository, name) == ("bert-base-uncased", "vocab.txt") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setitem(sys.modules, "ImageReward", score_packages.image_reward())
    monkeypatch.setitem(sys.modules, "pyiqa", score_packages.pyiqa())
    reward, quality = tmp_path / "w" / "ImageReward", tmp_path / "w" / "IQA-PyTorch-Weights"
    for one in (reward, quality):
        one.mkdir(parents=True)
    torch.save({"weight": torch.tensor(0.5)}, reward / "ImageReward.pt")
    (reward / "med_config.json").write_text("{}")
    state = {"params": {"weight": torch.tensor(0.25)}}
    torch.save(state, quality / "cfanet_nr_koniq_res50-9a73138b.pth")
    return Sources(tmp_path / "w")


def test_packages_score_every_frame_with_the_weights_of_the_folder(packages, folder, capsys):
    ready = prepare(["image-reward", "topiq"], packages, CPU)
    assert capsys.readouterr().out == "", "stdout is for the result"
    rows = measure(folder, ready, PROMPTS)
    for row in rows:
        mean = media.load(folder.path / row["name"]).mean()
        words = len(row["prompt"].split())
        assert row["image-reward"] == pytest.approx(words * mean * 0.5, rel=1e-5)
        assert row["topiq"] == pytest.approx(mean / 255 * 0.25, rel=1e-5)
    assert ready["topiq"].settings["package"] == "pyiqa (version unknown)"
    assert len(ready["image-reward"].settings["weights_sha256"]) == 64
    (line,) = cut_warnings(ready, {"a": "word " * 36, "b": "word " * 35})
    assert line == "image-reward read the first 35 tokens of 1 longer prompts"


def test_packages_with_incomplete_weights_are_refused(packages):
    """ImageReward itself would go on with random ones."""
    torch.save({"other": torch.tensor(1.0)}, packages.folder / "ImageReward" / "ImageReward.pt")
    with pytest.raises(UnavailableError, match=r"ImageReward\.pt cannot be loaded: the weights lack weight"):
        prepare(["image-reward"], packages, CPU)
    path = packages.folder / "IQA-PyTorch-Weights" / "cfanet_nr_koniq_res50-9a73138b.pth"
    torch.save({"params": {}}, path)
    with pytest.raises(UnavailableError, match=r"(?s)9a73138b\.pth cannot be loaded: .*Missing key"):
        prepare(["topiq"], packages, CPU)


def test_packages_without_their_files_are_unavailable(packages, monkeypatch):
    import huggingface_hub

    assert METRICS["image-reward"].missing(packages) is None
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    reason = METRICS["image-reward"].missing(packages)
    assert "fetch its vocab.txt (hf download bert-base-uncased)" in reason
    (packages.folder / "bert-base-uncased").mkdir()
    (packages.folder / "bert-base-uncased" / "vocab.txt").touch()
    assert BERT.missing(packages) == reason, "ImageReward looks in the cache only"
    (packages.folder / "ImageReward" / "med_config.json").unlink()
    assert "put its ImageReward.pt and med_config.json into ImageReward/" in METRICS["image-reward"].missing(
        packages
    )
