"""Questions to a real vLLM, EVS on."""

import base64
import urllib.request
from contextlib import contextmanager

import av
import numpy
import pytest
from commands import run_module
from PIL import Image

from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.faults import BadInput
from checkpoint.opened import load_tokenizer
from serve import demo
from serve.ask import ask, content_parts, first_model
from serve.demo import demonstrate, draw_page, draw_square, draw_video, questions
from serve.media import decoding_faults


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    images = [folder / "page.png", folder / "red.png", folder / "blue.png"]
    draw_page(images[0])
    for path in images[1:]:
        draw_square(path, path.stem)
    draw_video(folder / "clip.mp4")
    return images, folder / "clip.mp4"


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def run(*arguments):
    return run_module("serve.ask", *arguments)


@pytest.mark.server
def test_the_server_is_healthy_and_lists_its_name(server, client):
    assert urllib.request.urlopen(server.url.removesuffix("/v1") + "/health").status == 200
    assert first_model(client) == server.model == "tiny"


@pytest.mark.server
@pytest.mark.parametrize("title", ["list", "page", "two images", "video"])
def test_prompts_have_the_length_we_count(title, server, client, media, tiny_config):
    """The client's messages, built by our prompt builder for the server's video, and vLLM's own
    count.
    """
    parts = questions(*media)[title]
    messages = [{"role": "system", "content": "/no_think"}, {"role": "user", "content": parts}]
    sample = Sample(title, messages, "test")
    tokenizer = load_tokenizer(tiny_config)
    prompt = build_prompt(sample, tiny_config, tokenizer, server.settings.video)
    answer = ask(client, server.model, parts, max_tokens=4)
    assert answer.prompt_tokens == prompt.length
    assert 1 <= answer.completion_tokens <= 4
    if title == "video":  # 8 s at 2 fps, so EVS must have dropped something
        assert answer.prompt_tokens < len(prompt.token_ids)


@pytest.mark.server
def test_the_same_question_gets_the_same_answer(server, client, media):
    parts = questions(*media)["page"]
    first, second = (ask(client, server.model, parts, max_tokens=8).text for _ in range(2))
    assert first == second


@pytest.mark.server
def test_the_command_prints_answer_counts_and_time(server, media):
    (image, *_), video = media
    url = server.url.removesuffix("/v1")
    media_options = ["--image", image, "--video", video]
    done = run(url, *media_options, "--text", "What?", "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert " prompt tokens, " in done.stdout.splitlines()[-1]


@pytest.mark.server
def test_what_the_server_refuses_is_bad_input(server, client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n no image")
    for parts in (
        content_parts(["long " * 80_000]),
        content_parts(images=[tmp_path / "broken.png"]),
    ):
        with pytest.raises(BadInput, match="request: "):
            ask(client, server.model, parts)
    remote = content_parts(images=["https://example.com/a.png"])
    with pytest.raises(BadInput, match="serve with --allowed-media-domains"):
        ask(client, server.model, remote)
    done = run(server.url, "--image", tmp_path / "broken.png")
    assert done.returncode == 2
    assert done.stderr.startswith("error: request: ")
    assert "Traceback" not in done.stderr


def test_missing_files_and_pictures_of_16_bits_are_all_named(tmp_path):
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(BadInput) as caught:
        content_parts(
            images=[tmp_path / "none.png", tmp_path / "deep.png"], videos=[tmp_path / "none.mp4"]
        )
    assert [fault.where for fault in caught.value.faults] == [
        str(tmp_path / name) for name in ("none.png", "deep.png", "none.mp4")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9", "--text", "x"], "no server answers"),
        (["http://127.0.0.1:9"], "nothing to ask"),
        (["http://127.0.0.1:9", "--text", "x", "--video-pruning-rate", "0.5"], "cannot be changed"),
        (["http://127.0.0.1:9", "--text", "x", "--fps", "1"], "video.fps: cannot be changed"),
        (["nowhere", "--text", "x", "--fps", "0"], "video.fps: is '0'"),
        (["nowhere", "--text", "x"], "no such directory"),
        (["nowhere", "--text", " "], "nothing to ask"),
        (["nowhere", "--text", "x", "--max-tokens", "0"], "--max-tokens: is 0"),
        (["nowhere", "--text", "x", "--temperature", "nan"], "--temperature: is nan"),
        (["nowhere", "--text", "x", "--model", "x"], "--model: chooses a model of a running"),
        (["nowhere", "--image", "https://a/b.png"], "the server that is started here fetches none"),
        (["http://127.0.0.1:9", "--text", "\udcff"], "--text: is not UTF-8"),
        (
            ["nowhere", "--image", "data:image/png;base64,AAAA"],
            "data:image/png;base64,AAAA: cannot be read",
        ),
    ],
)
def test_bad_questions_end_with_status_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video-pruning-rate", "0"], "there is no EVS to show"),
        (["--image", "a.png"], "was given 1 times"),
    ],
)
def test_a_demo_that_would_show_nothing_is_refused(tiny, arguments, message):
    done = run_module("serve.demo", tiny, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_is_known_by_its_content(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture", "JPEG")
    (part,) = content_parts(images=[tmp_path / "picture"])
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")


def faults_of(**media):
    with pytest.raises(BadInput) as caught:
        content_parts(**media)
    (fault,) = caught.value.faults
    assert len(str(fault)) < 300
    return f"{fault.what} ({fault.remedy})"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_data_url_of_a_deep_picture_is_refused_as_its_file_is(tmp_path, mode):
    path = tmp_path / "deep.tiff"
    Image.new(mode, (400, 400)).save(path)
    url = f"data:image/tiff;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, url, f"DATA{url[4:]}"):
        assert f"more than 8 bits (mode {mode}" in faults_of(images=[source])


def data_url(kind, path):
    return f"data:{kind}/any;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_audio(path, codec):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=48000)
        samples = numpy.zeros((1, 9600), dtype=numpy.int16)
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.sample_rate = 48000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


AUDIO = {"a.mp3": "mp3", "a.wav": "pcm_s16le", "a.m4a": "aac", "a.mp4": "aac", "a.aac": "aac"}
AUDIO |= {"a.flac": "flac", "a.ogg": "libopus", "a.webm": "libopus", "a.mka": "aac"}


@pytest.mark.parametrize("name", AUDIO)
def test_audio_is_neither_a_clip_nor_a_picture(tmp_path, name):
    write_audio(tmp_path / name, AUDIO[name])
    for source in (tmp_path / name, data_url("audio", tmp_path / name)):
        assert faults_of(videos=[source]).startswith("is audio, not a clip")
        assert faults_of(images=[source]).startswith("is audio, not a picture")


CLIPS = {"c.mp4": "mpeg4", "c.mov": "mpeg4", "c.mkv": "mpeg4", "c.avi": "mpeg4", "c.3gp": "mpeg4"}
CLIPS |= {"c.ts": "mpeg2video", "c.m2ts": "mpeg2video", "c.mpg": "mpeg2video", "c.flv": "flv1"}
CLIPS |= {"c.webm": "libvpx"}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_no_picture_whatever_it_is_called(tmp_path, name):
    with av.open(tmp_path / name, "w") as container:
        stream = container.add_stream(CLIPS[name], rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame(176, 144, "yuv420p")))
        container.mux(stream.encode())
    path = (tmp_path / name).rename(tmp_path / "clip.png")
    for source in (path, data_url("image", path)):
        assert faults_of(images=[source]) == "is a clip, not a picture (give it to --video)"
        content_parts(videos=[source])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_a_picture_is_no_clip_whatever_it_is_called(tmp_path, format):
    path = tmp_path / "picture.mp4"
    Image.new("RGB", (64, 64), "red").save(path, format)
    for source in (path, data_url("video", path)):
        assert faults_of(videos=[source]) == "is a picture, not a clip (give it to --image)"
        content_parts(images=[source])


@pytest.mark.parametrize("text", ["What?", "é" * 4097, "<svg/>", "version https://git-lfs\n"])
def test_a_text_is_no_medium(tmp_path, text):
    (tmp_path / "clip.mp4").write_text(text)
    assert faults_of(videos=[tmp_path / "clip.mp4"]).startswith("is text, not a clip")
    assert faults_of(images=[tmp_path / "clip.mp4"]).startswith("is text, not a picture")
    (tmp_path / "clip.mp4").write_text("")
    assert faults_of(videos=[tmp_path / "clip.mp4"]).startswith("is empty")


def test_what_is_both_or_unknown_is_left_to_the_server(tmp_path):
    frame = Image.new("RGB", (64, 64), "red")
    other = Image.new("RGB", (64, 64), "blue")
    for name in ("both.gif", "both.png"):
        frame.save(tmp_path / name, save_all=True, append_images=[other])
        assert len(content_parts(images=[tmp_path / name], videos=[tmp_path / name])) == 2
    (tmp_path / "unknown").write_bytes(bytes(range(256)))
    assert len(content_parts(images=[tmp_path / "unknown"], videos=[tmp_path / "unknown"])) == 2
    frame.save(tmp_path / "frame.jpg")
    encoded = base64.b64encode((tmp_path / "frame.jpg").read_bytes()).decode()
    assert content_parts(videos=[f"data:video/jpeg;base64,{encoded}"])


def test_urls_go_through_as_they_are():
    (part,) = content_parts(images=["https://example.org/a.png"])
    assert part == {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.mark.server
def test_the_demo_asks_all_and_shows_when_evs_saved_nothing(
    server, media, tiny, monkeypatch, capsys
):
    @contextmanager
    def same_server(directory, settings):
        yield server

    monkeypatch.setattr(demo, "running_server", same_server)
    assert demonstrate(tiny, server.settings, *media, max_tokens=2) == 1
    printed = capsys.readouterr().out
    for title in ("list", "page", "two images", "video"):
        assert f"\n{title}: W" in printed
    assert "(0% fewer)" in printed


def test_media_that_no_decoder_reads_are_named(tmp_path):
    draw_square(tmp_path / "whole.png", "red")
    draw_video(tmp_path / "whole.mp4", seconds=1)
    for kind in ("png", "mp4"):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    images = [str(tmp_path / name) for name in ("whole.png", "cut.png")]
    videos = [str(tmp_path / name) for name in ("cut.mp4", "whole.mp4")]
    parts = content_parts(images=images, videos=videos)
    faults = [fault.where for fault in decoding_faults([*images, *videos], parts)]
    assert faults == [images[1], videos[0]]
