"""Resizing in uint8: near to Pillow, on its own threads."""

import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_media import picture

from hybridquant_vllm.pixels import PIXEL_POOL, cut_tiles, resize, resize_all


def in_float(pixels, height, width):
    """What vLLM does: float32, not clamped."""
    values = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(
        values, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(720, 1280), (1080, 1920), (272, 640), (600, 400), (37, 900)])
def test_nearer_to_pillow_than_float_and_within_half_a_step_of_float(size):
    pixels = picture(7, size[1], size[0])
    pillow = np.asarray(Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC))
    ours = resize(pixels, 512, 512).astype(float)
    stock = in_float(pixels, 512, 512)
    assert np.abs(ours - stock).mean() < 0.5
    assert np.abs(ours - pillow).mean() < np.abs(stock - pillow).mean()
    assert np.abs(ours - pillow).max() <= 2


def test_frames_of_the_right_size_are_not_copied():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    assert resize_all(frames, 8, 8) is frames


def test_frames_in_parallel_are_those_one_by_one():
    frames = np.stack([picture(number, 96, 64) for number in range(9)])
    one_by_one = np.stack([resize(frame, 40, 56) for frame in frames])
    assert np.array_equal(resize_all(frames, 40, 56), one_by_one)


def test_tiles_are_cut_row_by_row_with_the_thumbnail_last():
    pixels = picture(3, 32, 16)
    tiles = cut_tiles(pixels, 2, 1, 16, thumbnail=True)
    assert tiles.shape == (3, 16, 16, 3)
    assert np.array_equal(tiles[0], pixels[:, :16])
    assert np.array_equal(tiles[1], pixels[:, 16:])
    assert np.array_equal(tiles[2], resize(pixels, 16, 16))
    assert len(cut_tiles(pixels, 1, 1, 16, thumbnail=True)) == 1


def _resize_in_child(queue):
    queue.put(resize_all(np.zeros((2, 8, 8, 3), np.uint8), 4, 4).shape)


def test_a_forked_process_gets_threads_of_its_own():
    PIXEL_POOL.map(abs, [1])
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=_resize_in_child, args=(queue,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert queue.get() == (2, 4, 4, 3)
