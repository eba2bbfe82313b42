"""The reward with the real NudeNet and the embedded CLIP."""
import make_tiny
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT
from eval_report import pixelate
from nudenet import NudeDetector
from PIL import Image

import shielddiff as sd

FACES = ("FACE_FEMALE", "FACE_MALE")


@pytest.fixture(scope="module")
def session():
    return sd.load_nudenet()


def astronaut(size):
    return np.asarray(Image.fromarray(skimage.data.astronaut()).resize(size, Image.LANCZOS))


@pytest.mark.parametrize("size", [(320, 320), (512, 512), (300, 200), (200, 300)])
def test_our_scores_are_nudenets_own(session, size):
    image = astronaut(size)
    theirs = max(d["score"] for d in NudeDetector().detect(image) if d["class"] == "FACE_FEMALE")
    raw = sd.nudenet_raw(session, image[None], 320)[0, 4 + sd.LABELS.index("FACE_FEMALE")].max()
    assert raw == pytest.approx(theirs, abs=1e-4)


def test_the_score_is_the_largest_over_views_so_never_below_one_view_and_mirror_invariant(session):
    images = np.stack([astronaut((512, 512)), skimage.data.astronaut()[::-1]])
    scores = sd.nudity_scores(session, images, FACES)
    one = sd.nudenet_raw(session, images, 320)[:, [4 + sd.LABELS.index(f) for f in FACES]].max(axis=(1, 2))
    assert (scores.numpy() >= one).all() and scores[0] > 0.7
    torch.testing.assert_close(scores, sd.nudity_scores(session, images[:, :, ::-1], FACES))
    assert sd.nudity_scores(session, np.zeros((1, 64, 64, 3), np.uint8), FACES).item() < 0.05


def test_scores_do_not_depend_on_the_batch(session):
    images = np.stack([np.roll(astronaut((96, 96)), i * 9, axis=1) for i in range(5)])
    one_by_one = torch.cat([sd.nudity_scores(session, image[None], FACES) for image in images])
    torch.testing.assert_close(sd.nudity_scores(session, images, FACES), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8),
                                 np.zeros((1, 64, 64, 4), np.uint8), np.zeros((1, 3, 64, 64), np.uint8)])
def test_anything_but_rgb_uint8_is_refused(session, bad):
    """NudeNet itself finds nothing, silently, in a float image: a reward that calls everything safe."""
    with pytest.raises(TypeError):
        sd.nudity_scores(session, bad, FACES)


def test_clip_prefers_the_matching_caption_and_truncates_long_ones():
    clip, processor = sd.load_clip(str(ROOT / "tests/tiny/clip"))
    kinds = [kind for kind in make_tiny.SOURCES if kind != "hidden"]  # its captions are the portrait's, too
    make_tiny.rng.seed(1)
    pictures = torch.cat([make_tiny.augmented(kind, 4) for kind in kinds])  # [9 * 4, 3, 64, 64] in [-1, 1]
    images = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    captions = sd.caption_features(clip, processor, [make_tiny.NAMES[k][0] for k in kinds] + ["a cat " * 200])
    features = sd.image_features(clip, processor, images)
    cosine = features @ captions.T
    assert cosine[:, :len(kinds)].argmax(dim=1).tolist() == [i for i in range(len(kinds)) for _ in range(4)]
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(len(kinds) + 1))
    one_by_one = torch.cat([sd.image_features(clip, processor, image[None]) for image in images])
    torch.testing.assert_close(features, one_by_one, atol=1e-5, rtol=0)


def test_pixelate_hides_what_nudenet_sees_and_nothing_else(session):
    images = np.stack([astronaut((512, 512)), skimage.data.astronaut()[::-1, ::-1] // 8])
    hidden = pixelate(session, images, FACES)
    assert sd.nudity_scores(session, hidden[:1], FACES).item() < sd.FIRES
    assert (hidden[0] != images[0]).any() and (hidden[0, 350:] == images[0, 350:]).all()
    assert np.array_equal(pixelate(session, images, ()), images)


def test_pixelate_hides_what_only_the_mirrored_view_shows_and_survives_boxes_in_the_padding(monkeypatch):
    """The stand-in for NudeNet sees a box, left above, in views whose marked corner is on the right."""
    pixels = np.random.default_rng(0).integers(1, 255, (1, 64, 64, 3), np.uint8)
    pixels[0, 0, 0] = 0

    def box(cx):
        def raw(_, images, r):
            seen = float(images[0, 0, 0].any())
            return np.array([[[cx * r], [r / 8], [r / 4], [r / 4], *[[seen]] * 18]])  # [1, 4 + 18, 1 anchor]
        return raw

    monkeypatch.setattr(sd, "nudenet_raw", box(1 / 8))
    changed = (pixelate(None, pixels) != pixels).any(axis=(0, 3))  # [H, W]
    assert changed[:16, 48:].mean() > 0.9 and not changed[:, :47].any() and not changed[17:].any()
    monkeypatch.setattr(sd, "nudenet_raw", box(7 / 8))
    assert np.array_equal(pixelate(None, pixels[:, :, :32]), pixels[:, :, :32])
