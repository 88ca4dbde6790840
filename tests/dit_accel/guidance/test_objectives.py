"""Objectives of a head search: captions read back, the rule checker, the bundled net, and scorers on tiny
random weights.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_clip import save_aesthetics, save_clip

from dit_accel import UnavailableError
from dit_accel.guidance import objectives
from dit_accel.guidance.objectives import HarmonicMean, attributes, name_of, named
from dit_accel.pipelines.tiny import caption, render
from dit_accel.pipelines.tiny.scenes import BACKGROUNDS, COLOURS, POSITIONS, Placed, Scene, sample
from dit_accel.pipelines.tiny.sprites import OBJECTS
from dit_accel.scorers import scene_encoder
from dit_accel.scorers.image_scorers import FRAMES

FOX = Scene((Placed("fox", "top left"),), "blue", "striped")


def test_attributes_are_the_share_that_is_right():
    half = Scene((Placed("crown", "top left"),), "pink", "striped")
    images = np.stack([render(scene, 64, 64)[0] for scene in (FOX, half)])
    assert attributes(images, [caption(FOX)] * 2) == [1.0, 0.5]
    video = Scene((Placed("fox", "center"),), "blue", "plain", motion="left")
    frames = render(video, 64, 64, 9)[None]
    assert attributes(frames, [caption(video)]) == [1.0]
    assert attributes(frames[:, ::-1], [caption(video)]) == [0.8]


def test_harmonic_mean_of_raw_scores():
    def one(images, prompts):
        return [1.0, 4.0]

    def three(images, prompts):
        return [3.0, 4.0]

    mean = HarmonicMean([one, three])
    assert mean(None, None) == [1.5, 4.0]
    assert mean.name == f"harmonic mean of {name_of(one)}, {name_of(three)}"
    with pytest.raises(ValueError, match=r"needs positive scores, and .*zero gave 0"):
        HarmonicMean([one, zero])(None, None)
    with pytest.raises(ValueError, match="at least two objectives, got 1"):
        HarmonicMean([one])


def zero(images, prompts):
    return [0.0, 1.0]


@pytest.mark.parametrize("text", ["pick", "attributes:/somewhere", "scenes:/somewhere", ""])
def test_unknown_names(text):
    names = "attributes, scenes, clip, pickscore, aesthetics, hpsv2"
    with pytest.raises(ValueError, match=f"must be one of {names}; those after scenes may have a folder"):
        named(text)
    assert named("attributes") is objectives.attributes


# -- the bundled net -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return named("scenes")


def drawn(count: int, video: bool = False) -> tuple[list[Scene], list[str], np.ndarray]:
    """Scenes of combinations that nothing was trained on, their captions and drawings."""
    rng = random.Random(5)
    found = [sample(rng, "held_out", video) for _ in range(count)]
    images = np.stack([render(scene, 64, 64, 9 if video else 1) for scene in found])
    return found, [caption(scene) for scene in found], images if video else images[:, 0]


def other_object(scene: Scene) -> Scene:
    first = scene.objects[0]
    unused = next(name for name in OBJECTS if name not in [each.name for each in scene.objects])
    return replace(scene, objects=(replace(first, name=unused), *scene.objects[1:]))


def other_colour(scene: Scene) -> Scene:
    return replace(scene, colour=next(name for name in COLOURS if name != scene.colour))


def other_background(scene: Scene) -> Scene:
    return replace(scene, background=next(name for name in BACKGROUNDS if name != scene.background))


class TestScenes:
    @pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
    def test_a_wrong_attribute_costs_its_share(self, scenes, video):
        """Of three to five: each object, colour, background, and that nothing stands elsewhere."""
        found, captions, images = drawn(16, video)
        right = np.array(scenes(images, captions))
        assert right.min() > 0.97
        for changed in (other_object, other_colour, other_background):
            wrong = np.array(scenes(images, [caption(changed(scene)) for scene in found]))
            share = np.array([1 / (3 + len(scene.objects)) for scene in found])
            assert (right - wrong > share - 0.04).all()
            assert (wrong > 1 - share - 0.04).all(), "the others are still right"

    def test_an_object_too_many_costs_a_little(self, scenes):
        one, two = (Placed("fox", "top left"),), (Placed("fox", "top left"), Placed("crown", "bottom right"))
        images = np.stack([render(Scene(each, "grey", "plain"), 64, 64)[0] for each in (one, two)])
        right, wrong = scenes(images, [caption(Scene(one, "grey", "plain"))] * 2)
        assert wrong == pytest.approx(right - 1 / 8 / 4, abs=0.01)

    def test_is_the_mean_probability_of_all_frames(self, scenes):
        """Of a clip whose background changes half-way, with 9 frames more than are looked at."""
        first = Scene((Placed("fox", "center"),), "blue", "plain", motion="left")
        second = replace(first, colour="pink")
        clip = np.concatenate(
            [render(scene, 64, 96, 9)[:8] for scene in (first, second)] + [render(second, 64, 96)]
        )
        (score,) = scenes(clip[None], [caption(first)])
        frames = clip[np.linspace(0, 16, FRAMES).round().astype(int)]
        net = scene_encoder.load().double()
        with torch.no_grad():
            pixels = torch.from_numpy(frames).double().permute(0, 3, 1, 2)
            features = net(scene_encoder.resize(pixels) * 2 - 1)
            logits = {name: head(features).numpy() for name, head in net.classes.items()}
        odds = {name: np.exp(x) / np.exp(x).sum(1, keepdims=True) for name, x in logits.items()}
        asked = {"center": "fox", "colour": "blue", "background": "plain"}
        each = [odds[name][:, scene_encoder.CLASSES[name].index(value)] for name, value in asked.items()]
        each.append(np.mean([odds[name][:, 0] for name in POSITIONS if name != "center"], 0))
        assert score == pytest.approx(np.mean(each), rel=1e-5)
        assert score == pytest.approx(7 / 8, abs=0.02)

    @pytest.mark.parametrize(
        ("kind", "amounts"), [("blur", (0, 1.5, 2, 4, 8)), ("noise", (0, 2, 4, 8)), ("shift", (0, 1, 2, 4))]
    )
    def test_ranks_damage_as_attributes_do(self, scenes, kind, amounts):
        _, captions, images = drawn(24)
        means = []
        for amount in amounts:
            rng = random.Random(2)
            spoilt = np.stack([scene_encoder.spoil(image, kind, amount, rng) for image in images])
            means.append([np.mean(objective(spoilt, captions)) for objective in (scenes, attributes)])
        assert (np.diff(means, axis=0) < 0).all(), means

    def test_depends_on_neither_batch_nor_memory_layout(self, scenes):
        _, captions, images = drawn(5)
        noisy = images + 0.5 * np.random.default_rng(0).standard_normal(images.shape, np.float32)
        whole = scenes(noisy, captions)
        assert whole == [scenes(one[None], [text])[0] for one, text in zip(noisy, captions, strict=True)]
        assert len(set(whole)) == 5
        channels_first = np.ascontiguousarray(noisy.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        assert whole == named("scenes")(channels_first, captions)

    def test_runs_where_it_is_told(self):
        assert {weight.device.type for weight in named("scenes", "meta").encoder.parameters()} == {"meta"}

    def test_other_prompts_are_refused(self, scenes):
        with pytest.raises(ValueError, match="got 'a cat'"):
            scenes(np.zeros((1, 64, 64, 3), np.float32), ["a cat"])


# -- trained scorers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, image processor and tokenizer of a tiny random CLIP."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 16, 16, 3), np.float32)


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def pixels(images) -> torch.Tensor:
    """What CLIP is shown of pictures that already have its size."""
    images = (images * 255).round() / 255
    return torch.from_numpy((images - MEAN) / STD).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_clip_is_the_scaled_cosine(folder, images, name):
    from transformers import CLIPModel

    scorer = named(f"{name}:{folder}")
    assert name_of(scorer) == name
    prompts = ["a red circle", "a blue circle circle circle circle circle circle"]  # the second is cut
    tokens = torch.tensor([[0, 2, 3, 5, 1, 1, 1, 1], [0, 2, 4, 5, 5, 5, 5, 1]])
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(
            tokens, pixels(images), attention_mask=(torch.arange(8) < torch.tensor([[5], [8]])).long()
        )
    expected = logits.logits_per_image.diagonal().tolist()
    assert scorer(images, prompts) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_a_video_scores_the_mean_of_its_frames(folder, images):
    scorer = named(f"clip:{folder}")
    each = scorer(images, ["a red circle"] * 2)
    assert scorer(images[None], ["a red circle"]) == pytest.approx([sum(each) / 2], rel=1e-5)


def test_aesthetics_are_linear_layers_on_the_embedding(folder, images, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    model = save_aesthetics(tmp_path, folder)
    scores = named(f"aesthetics:{tmp_path}")(images, ["a", "a"])
    with torch.no_grad():
        plain = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
        x = plain(pixel_values=pixels(images)).image_embeds
        x = x / x.norm(dim=-1, keepdim=True)
        for index in (0, 2, 4, 6, 7):  # the names in the published weights
            x = (
                x @ model.state_dict()[f"layers.{index}.weight"].T
                + model.state_dict()[f"layers.{index}.bias"]
            )
    assert scores == pytest.approx(x.flatten().tolist(), rel=1e-4, abs=1e-5)
    with pytest.raises(UnavailableError, match=r"the weights lack layers\.0\.bias"):
        named(f"aesthetics:{folder}")


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("clip", ["openai/clip-vit-large-patch14"]),
        ("pickscore", ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        ("aesthetics", ["shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"]),
        ("hpsv2", ["adams-story/HPSv2-hf"]),
    ],
)
def test_missing_weights_say_what_and_where(name, sources, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UnavailableError) as error:
        named(name)
    text = str(error.value)
    assert all(f"hf download {source}" in text for source in sources)
    assert "--allow-download" in text
    assert f"{name}:FOLDER" in text
    with pytest.raises(UnavailableError, match=f"{tmp_path} does not hold them"):
        named(f"{name}:{tmp_path}")
    with pytest.raises(UnavailableError, match="nowhere is no such folder"):
        named(f"{name}:{tmp_path}/nowhere")
