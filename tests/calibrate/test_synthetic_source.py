import hashlib
import io
import json
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from calibrate.samples import media_bytes
from calibrate.sources.synthetic.clips import SIDE, video_event, video_static
from calibrate.sources.synthetic.drawing import mp4_bytes, png_bytes, stream
from calibrate.sources.synthetic.kinds import KINDS, compose, draw, synthetic
from calibrate.sources.synthetic.lists import frequent, image_list
from calibrate.sources.synthetic.scenes import TILE
from checkpoint.faults import BadInput


def _urls(sample, kind):
    return [part[kind]["url"] for part in sample.messages[1]["content"] if part["type"] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes(kind):
    first, again = (json.dumps(draw(kind, 3, 5).messages) for _ in range(2))
    assert first == again
    assert first != json.dumps(draw(kind, 4, 5).messages)
    assert first != json.dumps(draw(kind, 3, 6).messages)


def test_random_streams_are_frozen():
    # If this fails, every item of every seed has changed, and with it the meaning of published
    # accuracies.
    assert stream("document", 0, 0).randint(1 << 30, size=2).tolist() == [167523360, 540860543]
    assert compose("text", 0, 0).answer == "circle yellow orange cross star red square purple"


def test_text_pixels_do_not_depend_on_the_machine():
    digest = hashlib.sha256(compose("chart", 0, 0).pictures[0].pixels.tobytes()).hexdigest()
    assert digest == "ae7d9bc992b8f8d0bff592d2784aba77c104e6e3959aa4bb4788f6b9c9d0adc2"


def test_every_sample_has_an_answer_and_is_unlike_its_neighbours():
    for kind in KINDS:
        samples = [draw(kind, 0, index) for index in range(6)]
        assert len({sample.id for sample in samples}) == 6
        assert len({json.dumps(sample.messages) for sample in samples}) == 6
        assert all(type(sample.answer) is str and sample.answer for sample in samples)
        assert all(
            sample.messages[0] == {"role": "system", "content": "/no_think"} for sample in samples
        )


def test_png_is_lossless_and_clips_keep_their_frames():
    pixels = compose("chart", 0, 1).pictures[0].pixels
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))), pixels)
    frames = np.stack(
        [picture.pixels for picture in video_static(stream("x", 0), frames=6).pictures]
    )
    with av.open(io.BytesIO(mp4_bytes(frames))) as clip:
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
        assert float(clip.streams.video[0].average_rate) == 2.0
    assert len(decoded) == 6
    assert np.abs(np.stack(decoded).astype(int) - frames).mean() < 4


def test_urls_decode():
    assert media_bytes(_urls(draw("document", 0, 0), "image_url")[0], "x").startswith(b"\x89PNG")
    assert media_bytes(_urls(draw("video_event", 0, 0), "video_url")[0], "x")[4:8] == b"ftyp"
    pictures = draw("images", 0, 0)
    assert 2 <= len(_urls(pictures, "image_url")) <= 4


def test_an_event_is_never_in_the_first_frame_and_ends_up_in_another():
    for index in range(30):
        scene = video_event(stream("event", index))
        named = {str(n) for n in range(10)}
        shown = [any(mark.name in named for mark in picture.marks) for picture in scene.pictures]
        assert not shown[0]
        assert 1 <= sum(shown) <= 3


def test_a_static_text_is_the_same_in_every_frame():
    scene = video_static(stream("static", 1))
    words = ["".join(mark.name for mark in picture.marks) for picture in scene.pictures]
    assert set(words) == {scene.answer}
    assert scene.pictures[0].pixels.shape == (SIDE, SIDE, 3)


def test_sizes_exercise_tiling():
    sizes = {compose("document", 0, index).pictures[0].pixels.shape[:2] for index in range(80)}
    assert (TILE, TILE) in sizes
    assert any(height == 2 * TILE and width == 2 * TILE for height, width in sizes)
    assert any(side % TILE for size in sizes for side in size)


def test_glyph_marks_lie_on_ink():
    picture = compose("document", 0, 2).pictures[0]
    paper = np.median(picture.pixels.reshape(-1, 3), axis=0)
    for mark in picture.marks:
        if mark.index and mark.name not in "OQDCVUJLT47":  # hollow or thin in the middle
            patch = picture.pixels[
                int(mark.y) - 10 : int(mark.y) + 10, int(mark.x) - 10 : int(mark.x) + 10
            ]
            assert np.abs(patch - paper).max() > 60, mark


def test_a_source_is_a_prefix_of_a_longer_one():
    longer = [sample.id for sample in synthetic({"text": 1, "chart": 2}, 8, seed=1)]
    assert [sample.id for sample in synthetic({"text": 1, "chart": 2}, 5, seed=1)] == longer[:5]
    assert longer != [sample.id for sample in synthetic({"text": 1, "chart": 2}, 8, seed=2)]


def test_further_questions_have_answers_and_are_not_the_first_again():
    for kind in KINDS:
        for index in range(5):
            scene = compose(kind, 0, index)
            questions = [
                scene.question.rsplit("\n", 1)[-1],
                *(question for question, _ in scene.more),
            ]
            assert len(set(questions)) == len(questions)
            assert all(answer for _, answer in scene.more)


def test_pictures_are_asked_about_in_mixed_order_and_not_all():
    """Asked in turn and all, the later questions fall to elimination, and no picture needs to be
    looked at.
    """
    scenes = [compose("images", 0, index) for index in range(40)]
    assert all(len(scene.more) == len(scene.pictures) for scene in scenes)
    asked = [[question.startswith("Which") for question, _ in scene.more] for scene in scenes]
    assert any(kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True) for kinds in asked)


@pytest.mark.parametrize("close", [False, True])
def test_words_are_answered_from_most_to_least_frequent_and_no_two_are_there_as_often(close):
    for index in range(40):
        scene = frequent(stream("frequent", 0, index), close)
        words = Counter(scene.question.split("\n")[0].removeprefix("Words: ").split())
        (ranked, counts) = zip(*words.most_common(), strict=True)
        assert scene.answer == " ".join(ranked)
        assert len(set(counts)) == len(counts)
        if close:
            assert counts[0] <= 1.4 * counts[1]
            assert 50 < sum(counts) < 230


def test_answers_about_a_list_of_pictures_stand_in_the_list():
    for index in range(20):
        scene = image_list(stream("image_list", 0, index))
        *lines, question = scene.question.split("\n")
        shown = dict(line.removeprefix("Image ").split(": ") for line in lines)
        for asked, answer in [(question, scene.answer), *scene.more]:
            if asked.startswith("Which"):
                assert f"Which image shows a {shown[answer]}?" == asked
            else:
                assert (
                    shown[asked.removeprefix("What does image ").removesuffix(" show?")] == answer
                )


def test_bad_kinds_and_weights_are_all_named_before_the_first_sample():
    with pytest.raises(BadInput, match="did you mean chart") as caught:
        synthetic({"charts": 1.0, "text": 0.0}, 4, 0)
    assert len(caught.value.faults) == 2
    with pytest.raises(BadInput, match="no kind"):
        synthetic([], 4, 0)
    with pytest.raises(BadInput, match="did you mean document"):
        draw("documents", 0, 0)
