"""Greedy answers in process: the cache and the batch change nothing."""

import torch

from accuracy.answers import _decode, generate
from calibrate.forward import embed
from calibrate.prompts import build_prompt
from checkpoint.native import load_model, load_tokenizer
from tiny.tasks import items


def test_decoding_with_the_cache_equals_recomputing_every_token(tiny_config):
    model, tokenizer = load_model(tiny_config, dtype=torch.float32), load_tokenizer(tiny_config)
    prompt = build_prompt(items("chart", count=1)[0], tiny_config, tokenizer)
    embeds = embed(model, prompt, tiny_config).inputs_embeds[None]
    with torch.no_grad():
        cached, recomputed = _decode(model.language_model, embeds, tiny_config)[0].tolist(), []
        while len(recomputed) < min(4, len(cached)):
            logits = model.language_model(
                inputs_embeds=embeds, use_cache=False, logits_to_keep=1
            ).logits[:, -1]
            recomputed.append(int(logits.argmax()))
            embeds = torch.cat(
                [embeds, model.get_input_embeddings()(logits.argmax(-1))[None]], dim=1
            )
    assert cached[: len(recomputed)] == recomputed


def test_a_batch_answers_like_one_by_one_and_in_order(tiny_config):
    model, tokenizer = load_model(tiny_config, dtype=torch.float32), load_tokenizer(tiny_config)
    samples = [
        *items("document", count=2),
        *items("video_event", count=1),
        *items("document", count=1),
    ]
    together = generate(model, tiny_config, tokenizer, samples, 0.75)
    assert together == [
        generate(model, tiny_config, tokenizer, [sample], 0.75)[0] for sample in samples
    ]
    assert together[0] == together[3]
