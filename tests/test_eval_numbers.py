"""eval.py's statistics, summary and page on numbers made by hand: nothing is trained or drawn here."""
import numpy as np
import pytest

import eval as ev


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------ counting and statistics
def test_both_counting_rules_on_a_hand_made_detection_list():
    found = [["FACE_FEMALE", 0.9], ["FACE_FEMALE", 0.5], ["FACE_MALE", 0.45], ["BELLY_EXPOSED", 0.99]]
    faces = ("FACE_FEMALE", "FACE_MALE")
    assert [ev.count_boxes(found, t, faces) for t in (0.25, 0.45, 0.46, 0.6, 0.95)] == \
        [(3, 2), (3, 2), (2, 1), (1, 1), (0, 0)]
    assert ev.count_boxes(found, 0.25, ev.LABELS) == (4, 3) and ev.count_boxes([], 0.25, faces) == (0, 0)


def test_nrr_and_its_interval_against_the_closed_form():
    """Where the base model fires on every prompt, NRR is 1 - a binomial proportion."""
    n, p = 400, 0.3
    tuned = (np.arange(n) < n * p).astype(float)
    found = ev.bootstrap(np.stack([np.ones(n), tuned], axis=1), ev.nrr)
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert found["value"] == pytest.approx(1 - p)
    assert found["low"] == pytest.approx(1 - p - half, abs=half / 5)
    assert found["high"] == pytest.approx(1 - p + half, abs=half / 5)


def test_nrr_where_there_is_nothing_or_more_than_before():
    two = np.array([[1.0, 3.0], [1.0, 1.0]])
    assert ev.bootstrap(two, ev.nrr)["value"] == -1
    assert ev.bootstrap(np.zeros((5, 2)), ev.nrr) == dict(value=None, low=None, high=None)


def test_no_failure_among_few_pictures_is_not_called_certainty():
    never = ev.bootstrap(np.zeros((4, 1)), bound=(0, 1), trials=20)
    always = ev.bootstrap(np.ones((4, 1)), bound=(0, 1), trials=20)
    assert never == dict(value=0, low=0, high=pytest.approx(0.168433, abs=1e-5))  # Clopper-Pearson, 0 of 20
    assert always == dict(value=1, low=pytest.approx(1 - 0.168433, abs=1e-5), high=1)


# ------------------------------------------------------------------------------------ CLIP-KID
def test_clip_kid_of_three_pictures_is_its_formula():
    """Two prompts, the first with two pictures: the six ordered pairs i != j of k(x_i, x_j) + k(y_i, y_j) -
    k(x_i, y_j) - k(x_j, y_i), k = (cosine + 1)^3, divided by 3 * 2. Cosines are 0 or 1, kernels 1 or 8."""
    e, f = np.eye(2)
    x, y = np.stack([e, e, f]), np.stack([e, f, f])
    # (0, 1): k(e,e) + k(e,f) - k(e,f) - k(e,e) = 0; (0, 2): k(e,f) + k(e,f) - k(e,f) - k(f,e) = 0
    # (1, 2): k(e,f) + k(f,f) - k(e,f) - k(f,f) = 0
    assert ev.clip_kid(x, y, np.array([0, 0, 1]))["value"] == 0
    y = np.stack([f, f, e])
    # (0, 1): 8 + 8 - 1 - 1 = 14; (0, 2): 1 + 1 - 8 - 8 = -14, (1, 2): the same; sum over ordered pairs -28
    found = ev.clip_kid(x, y, np.array([0, 0, 1]))
    assert found["value"] == pytest.approx(-28 / 6) and found["n"] == 3


def test_clip_kid_s_interval_is_the_jackknife_s_over_prompts():
    """Leaving a prompt out is the estimate of the other prompts' pictures alone."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(4), [1, 2, 3, 3])
    x, y = unit(rng.normal(size=(9, 5)) + 1), unit(rng.normal(size=(9, 5)))
    found = ev.clip_kid(x, y, prompt)
    without = np.array([ev.clip_kid(x[prompt != p], y[prompt != p],
                                    np.unique(prompt[prompt != p], return_inverse=True)[1])["value"]
                        for p in range(4)])
    reach = 3.182446 * np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())  # Student's t, 3 degrees
    assert found["low"] == pytest.approx(found["value"] - reach, rel=1e-6)
    assert found["high"] == pytest.approx(found["value"] + reach, rel=1e-6)


@pytest.mark.parametrize("prompts", [[0], [0, 0, 0], [0, 1]])
def test_clip_kid_of_one_picture_or_one_prompt_has_no_interval(prompts):
    x = unit(np.arange(len(prompts) * 2).reshape(-1, 2) + 1.0)
    found = ev.clip_kid(x, x[::-1], np.array(prompts))
    assert found["low"] is None and found["high"] is None
    assert (found["value"] is None) == (len(prompts) == 1)  # one picture has no pair


def test_clip_kid_is_zero_in_expectation_for_halves_of_one_set_and_positive_for_shifted_ones():
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(60, 16)) + 1

    def halves(shift):
        rows = rng.permutation(60)
        return ev.clip_kid(unit(pool[rows[:30]]), unit(pool[rows[30:]] + shift), np.arange(30))

    null = np.array([halves(0)["value"] for _ in range(300)])
    assert abs(null.mean()) < 4 * null.std() / np.sqrt(300) and (null < 0).any() and (null > 0).any()
    shifted = halves(1 - 2 * (np.arange(16) % 2))
    assert shifted["low"] > null.max() and shifted["low"] < shifted["value"] < shifted["high"]


def test_clip_kid_of_pictures_from_shared_seeds_is_unbiased_too():
    """Rows are alike pair by pair though not in distribution: the plain estimate would come out negative."""
    rng, ours, plain = np.random.default_rng(0), [], []
    for _ in range(400):
        x = rng.normal(size=(10, 8)) + 1
        x, y = unit(x), unit(x + rng.normal(size=x.shape) * 0.1)
        ours.append(ev.clip_kid(x, y, np.arange(10))["value"])
        off, k = ~np.eye(10, dtype=bool), (x @ y.T + 1) ** 3
        plain.append(((x @ x.T + 1) ** 3)[off].mean() + ((y @ y.T + 1) ** 3)[off].mean() - 2 * k.mean())
    assert np.mean(plain) < -10 * abs(np.mean(ours))
