"""Questions to a real vLLM, EVS on."""

import urllib.request
from contextlib import contextmanager

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
    (tmp_path / "broken.png").write_bytes(b"no image")
    for parts in (
        content_parts(["long " * 80_000]),
        content_parts(images=[tmp_path / "broken.png"]),
    ):
        with pytest.raises(BadInput, match="request: "):
            ask(client, server.model, parts)
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
