"""Greedy answers in process: the cache and the batch change nothing."""

import torch

from accuracy.answers import generate
from calibrate.forward import embed
from calibrate.prompts import build_prompt
from checkpoint.native import load_model
from checkpoint.video import UNPRUNED, Video
from tiny.tasks import items


def test_decoding_with_the_cache_equals_recomputing_every_token(tiny_checkpoint):
    config = tiny_checkpoint.config
    tokenizer = tiny_checkpoint.tokenizer
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    (sample,) = items("chart", count=1)
    (cached,) = generate(model, config, tokenizer, [sample], UNPRUNED)
    prompt = build_prompt(sample, config, tokenizer, UNPRUNED)
    embeds = embed(model, prompt, config).inputs_embeds[None]
    recomputed = []
    with torch.no_grad():
        while len(recomputed) < 4:
            output = model.language_model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1)
            if int(token) == config.text["eos_token_id"]:
                break
            recomputed.append(int(token))
            following = model.get_input_embeddings()(token)[None]
            embeds = torch.cat([embeds, following], dim=1)
    assert recomputed
    assert cached.startswith(tokenizer.decode(recomputed, skip_special_tokens=True))


def test_a_batch_answers_like_one_by_one_and_in_order(tiny_checkpoint):
    config = tiny_checkpoint.config
    tokenizer = tiny_checkpoint.tokenizer
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    samples = [
        *items("document", count=2),
        *items("video_event", count=1),
        *items("document", count=1),
    ]
    together = generate(model, config, tokenizer, samples, Video())
    alone = []
    for sample in samples:
        alone += generate(model, config, tokenizer, [sample], Video())
    assert together == alone
    assert together[0] == together[3]
