"""The clip that a server is asked about before its users ask."""

import logging

import pytest

from checkpoint.video import Video
from hybridquant_vllm.frames import read_clip
from serve.own_server import OwnServer, own_server
from serve.warm_up import moving_clip, warm_up


@pytest.mark.parametrize("video", [Video(), Video(fps=0.3, max_frames=7), Video(max_frames=1)])
def test_the_most_frames_are_sampled_of_it(video):
    clip = read_clip(moving_clip(video), fps=video.fps, max_frames=video.max_frames)
    assert len(clip.indices) == video.max_frames


@pytest.mark.server
def test_a_server_answers_about_it(server, caplog):
    with caplog.at_level(logging.INFO):
        warm_up(own_server(server.settings), server.settings.video)
    assert "answered about a clip for warming up" in caplog.text


def test_a_server_that_does_not_answer_costs_a_warning_only(caplog):
    warm_up(OwnServer("http://127.0.0.1:9"), Video(max_frames=2))
    assert "did not answer about a clip" in caplog.text
