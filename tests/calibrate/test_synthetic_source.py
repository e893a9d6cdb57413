"""Synthetic samples: the same bytes for the same seed, answers that fit what is drawn."""

import hashlib
import io
import json
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from calibrate.media_urls import media_bytes
from calibrate.sources.synthetic.clips import SIDE, video_event, video_static
from calibrate.sources.synthetic.drawing import mp4_bytes, png_bytes, random_state
from calibrate.sources.synthetic.kinds import KINDS, compose, draw, synthetic
from calibrate.sources.synthetic.lists import code_list, frequent, image_list, recall
from calibrate.sources.synthetic.scenes import TILE, form
from checkpoint.faults import BadInput

TRAINING_KINDS = {
    "form": form,
    "recall": recall,
    "frequent": frequent,
    "code_list": code_list,
    "image_list": image_list,
}
# SHA-256 over questions, answers and the state of the generator, of 20 scenes of seed 0.
DIGESTS = {
    "document": "b1e388dadd4ca41b",
    "table": "8351b91c004ab42b",
    "chart": "b1fe3872239ec5ea",
    "images": "e44bd33814cca60e",
    "video_event": "f2e20cdf4b4d30dc",
    "video_static": "ea41e7c508f7c04c",
    "text": "d71e8b2c84446655",
    "order": "fc38d3ae7a08db23",
    "form": "3716e5cae1a0c2ba",
    "recall": "6897835104067464",
    "frequent": "d94f9ff6a2e2db35",
    "code_list": "5b3f2e232ee9f48b",
    "image_list": "4d13f8cc87a68526",
}


def urls(sample, kind):
    parts = sample.messages[1]["content"]
    return [part[kind]["url"] for part in parts if part["type"] == kind]


def encoded(kind, seed, index):
    return json.dumps(draw(kind, seed, index).messages)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes(kind):
    first = encoded(kind, 3, 5)
    assert first == encoded(kind, 3, 5)
    assert first != encoded(kind, 4, 5)
    assert first != encoded(kind, 3, 6)


def test_random_numbers_never_change():
    # If this fails, every item of every seed has changed, and with it the meaning of published
    # accuracies.
    numbers = random_state("document", 0, 0).randint(1 << 30, size=2)
    assert numbers.tolist() == [167523360, 540860543]
    assert compose("text", 0, 0).answer == "circle yellow orange cross star red square purple"


@pytest.mark.parametrize("kind", [*KINDS, *TRAINING_KINDS])
def test_every_kind_draws_its_random_numbers_in_the_same_order(kind):
    makers = KINDS | TRAINING_KINDS
    digest = hashlib.sha256()
    for index in range(20):
        random = random_state(kind, 0, index)
        scene = makers[kind](random)
        following = int(random.randint(1 << 30))
        content = [scene.question, scene.answer, scene.more, following]
        digest.update(json.dumps(content).encode())
    assert digest.hexdigest()[:16] == DIGESTS[kind]


def test_text_pixels_do_not_depend_on_the_machine():
    pixels = compose("chart", 0, 0).pictures[0].pixels
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == "ae7d9bc992b8f8d0bff592d2784aba77c104e6e3959aa4bb4788f6b9c9d0adc2"


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_an_answer_and_differs_from_the_others(kind):
    samples = [draw(kind, 0, index) for index in range(6)]
    assert len({sample.id for sample in samples}) == 6
    assert len({json.dumps(sample.messages) for sample in samples}) == 6
    for sample in samples:
        assert type(sample.answer) is str
        assert sample.answer
        assert sample.messages[0] == {"role": "system", "content": "/no_think"}


def test_png_is_lossless():
    pixels = compose("chart", 0, 1).pictures[0].pixels
    decoded = Image.open(io.BytesIO(png_bytes(pixels)))
    assert np.array_equal(np.asarray(decoded), pixels)


def test_mp4_keeps_every_frame_nearly_as_it_is():
    scene = video_static(random_state("x", 0), frames=6)
    frames = np.stack([picture.pixels for picture in scene.pictures])
    with av.open(io.BytesIO(mp4_bytes(frames))) as clip:
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
        assert float(clip.streams.video[0].average_rate) == 2.0
    assert len(decoded) == 6
    difference = np.stack(decoded).astype(int) - frames
    assert np.abs(difference).mean() < 4


def test_urls_decode():
    page = media_bytes(urls(draw("document", 0, 0), "image_url")[0], "x")
    assert page.startswith(b"\x89PNG")
    clip = media_bytes(urls(draw("video_event", 0, 0), "video_url")[0], "x")
    assert clip[4:8] == b"ftyp"
    pictures = draw("images", 0, 0)
    assert 2 <= len(urls(pictures, "image_url")) <= 4


@pytest.mark.parametrize("index", range(30))
def test_an_event_is_in_one_to_three_frames_but_never_in_the_first(index):
    scene = video_event(random_state("event", index))
    shown = []
    for picture in scene.pictures:
        shown.append(any(mark.name.isdigit() for mark in picture.marks))
    assert not shown[0]
    assert 1 <= sum(shown) <= 3


def test_a_static_text_is_the_same_in_every_frame():
    scene = video_static(random_state("static", 1))
    for picture in scene.pictures:
        assert "".join(mark.name for mark in picture.marks) == scene.answer
    assert scene.pictures[0].pixels.shape == (SIDE, SIDE, 3)


def test_pages_have_one_tile_and_several_and_some_are_resized():
    sizes = {compose("document", 0, index).pictures[0].pixels.shape[:2] for index in range(80)}
    assert (TILE, TILE) in sizes
    assert (2 * TILE, 2 * TILE) in sizes
    assert any(height % TILE or width % TILE for height, width in sizes)


def test_marks_of_glyphs_lie_on_ink():
    picture = compose("document", 0, 2).pictures[0]
    paper = np.median(picture.pixels.reshape(-1, 3), axis=0)
    hollow_or_thin_in_the_middle = "OQDCVUJLT47"
    for mark in picture.marks:
        if mark.index == 0 or mark.name in hollow_or_thin_in_the_middle:
            continue
        x, y = int(mark.x), int(mark.y)
        patch = picture.pixels[y - 10 : y + 10, x - 10 : x + 10]
        assert np.abs(patch - paper).max() > 60, mark


def test_a_source_is_a_prefix_of_a_longer_one():
    weights = {"text": 1, "chart": 2}
    longer = [sample.id for sample in synthetic(weights, 8, seed=1)]
    assert [sample.id for sample in synthetic(weights, 5, seed=1)] == longer[:5]
    assert [sample.id for sample in synthetic(weights, 8, seed=2)] != longer


@pytest.mark.parametrize("kind", KINDS)
def test_further_questions_have_answers_and_do_not_repeat_the_first(kind):
    for index in range(5):
        scene = compose(kind, 0, index)
        questions = [scene.question.rsplit("\n", 1)[-1]]
        for question, answer in scene.more:
            assert answer
            questions.append(question)
        assert len(set(questions)) == len(questions)


def test_pictures_are_asked_about_in_mixed_order_and_not_all():
    """If all questions were used in order, the last ones could be answered by elimination."""
    orders = []
    for index in range(40):
        scene = compose("images", 0, index)
        assert len(scene.more) == len(scene.pictures)
        orders.append([question.startswith("Which") for question, _ in scene.more])
    assert any(order not in (sorted(order), sorted(order, reverse=True)) for order in orders)


@pytest.mark.parametrize("close", [False, True])
def test_words_are_ordered_by_frequency_and_no_two_are_equally_frequent(close):
    for index in range(40):
        scene = frequent(random_state("frequent", 0, index), close)
        first_line = scene.question.split("\n")[0]
        words = Counter(first_line.removeprefix("Words: ").split())
        ranked = [word for word, _ in words.most_common()]
        counts = [count for _, count in words.most_common()]
        assert scene.answer == " ".join(ranked)
        assert len(set(counts)) == len(counts)
        if close:
            assert counts[0] <= 1.4 * counts[1]
            assert 50 < sum(counts) < 230


def test_answers_about_a_list_of_pictures_follow_from_the_list():
    for index in range(20):
        scene = image_list(random_state("image_list", 0, index))
        *lines, question = scene.question.split("\n")
        shown = dict(line.removeprefix("Image ").split(": ") for line in lines)
        for asked, answer in [(question, scene.answer), *scene.more]:
            if asked.startswith("Which"):
                assert f"Which image shows a {shown[answer]}?" == asked
            else:
                number = asked.removeprefix("What does image ").removesuffix(" show?")
                assert shown[number] == answer


def test_bad_kinds_and_weights_are_all_named_before_the_first_sample():
    with pytest.raises(BadInput, match="did you mean chart") as caught:
        synthetic({"charts": 1.0, "text": 0.0}, 4, 0)
    assert len(caught.value.faults) == 2
    with pytest.raises(BadInput, match="no kind"):
        synthetic([], 4, 0)
    with pytest.raises(BadInput, match="did you mean document"):
        draw("documents", 0, 0)
