"""The forward loop runs over the embeddings of serving: every kept token, once."""

from dataclasses import replace

import pytest
import torch
from calibrate_media import clip_bytes, image_part, picture, text, user, video_part

from calibrate.forward import Counts, embed, embed_all, forward_loop, logits, tile_embeddings
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.video import UNPRUNED


@pytest.fixture(scope="module")
def prompt(config, tokenizer):
    chat = user(image_part(picture(60, 60)), text("Same?"), video_part(clip_bytes(15, 10)))
    return build_prompt(Sample("s", [chat], "test"), config, tokenizer, UNPRUNED)


def pruned_at(prompt, rate):
    """The same prompt, to be pruned at another rate."""
    return replace(prompt, video=UNPRUNED.with_rate(rate))


@pytest.fixture(scope="module")
def text_prompt(config, tokenizer):
    sample = Sample("t", [{"role": "user", "content": "Read the table."}], "test")
    return build_prompt(sample, config, tokenizer, UNPRUNED)


def test_text_prompt_equals_the_model_on_its_tokens(model, text_prompt, config):
    with torch.no_grad():
        expected = model.language_model(input_ids=torch.tensor([text_prompt.token_ids])).logits[0]
    torch.testing.assert_close(
        logits(model, embed(model, text_prompt, config)), expected, rtol=0, atol=0
    )


def test_visual_tokens_hold_the_projected_tiles_in_order(model, prompt, config):
    embedded = embed(model, prompt, config)
    visual = embedded.inputs_embeds[embedded.token_ids == config.image_token_id]
    # Another number of tiles at once rounds some sums differently.
    torch.testing.assert_close(
        visual, tile_embeddings(model, prompt.tiles).flatten(0, 1), rtol=0.016, atol=2e-3
    )


def test_dense_tiles_equal_the_models_own_image_features(model, prompt, config):
    side = config.tile_size // 16
    tiles = (
        prompt.tiles.reshape(-1, 3, side, 16, side, 16).permute(0, 2, 4, 1, 3, 5).reshape(-1, 768)
    )
    grid = torch.tensor([[side, side]] * len(prompt.tiles))
    with torch.no_grad():
        features = model.get_image_features(tiles.to(model.dtype), grid).pooler_output
    expected = torch.stack(list(features))
    torch.testing.assert_close(
        tile_embeddings(model, prompt.tiles), expected, rtol=2**-6, atol=2**-6
    )


def test_rate_zero_keeps_every_token(model, prompt, config):
    embedded = embed(model, prompt, config)
    assert embedded.token_ids.tolist() == prompt.token_ids
    assert embedded.video_tokens_pruned == 0


@pytest.mark.parametrize("rate", [0.25, 0.75, 0.9])
def test_pruning_drops_video_tokens_only_and_as_many_as_served(rate, model, prompt, config):
    pruned = pruned_at(prompt, rate)
    embedded = embed(model, pruned, config)
    _, video = prompt.media
    assert len(embedded.token_ids) == pruned.length
    assert embedded.inputs_embeds.shape == (len(embedded.token_ids), config.text["hidden_size"])
    dropped = set((~embedded.kept).nonzero().flatten().tolist())
    assert len(dropped) == embedded.video_tokens_pruned
    assert dropped <= {place for run in video.visual for place in range(run.start, run.end)}
    first = video.visual[0]
    assert embedded.kept[first.start : first.end].all()


def test_pruned_embeddings_are_the_unpruned_ones_that_are_kept(model, prompt, config):
    whole = embed(model, prompt, config)
    pruned = embed(model, pruned_at(prompt, 0.75), config)
    torch.testing.assert_close(
        pruned.inputs_embeds, whole.inputs_embeds[pruned.kept], rtol=0, atol=0
    )


def test_forward_loop_shows_the_language_model_every_kept_token_once(
    model, prompt, text_prompt, config
):
    pruned = pruned_at(prompt, 0.75)
    seen = []
    layer = model.language_model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    try:
        counts = forward_loop(model, [pruned, text_prompt], config)
    finally:
        hook.remove()
    lengths = [pruned.length, len(text_prompt.token_ids)]
    assert seen == [(1, length) for length in lengths]
    each = config.tokens_per_tile
    assert counts == Counts(2, sum(lengths), each, 2 * each)


def test_forward_loop_takes_prompts_embedded_before(model, prompt, config):
    pruned = pruned_at(prompt, 0.5)
    held = embed_all(model, iter([pruned]), config)
    assert held[0].inputs_embeds.device.type == "cpu"
    counts = forward_loop(model, [pruned], config)
    assert forward_loop(model, held, config) == counts == forward_loop(model, held, config)


def test_forward_loop_takes_a_stream(model, text_prompt, config):
    assert forward_loop(model, iter([text_prompt] * 3), config, total=3).samples == 3


def test_forward_loop_leaves_no_inference_tensors(model, text_prompt, config):
    kept = []
    hook = model.language_model.lm_head.register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    try:
        forward_loop(model, [text_prompt], config)
    finally:
        hook.remove()
    assert not kept[0].is_inference()
    assert not kept[0].requires_grad
