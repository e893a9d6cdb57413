"""The native load and vLLM give the same log-probabilities for the same directory.

Errors are shares of the mean log-probability: a trained checkpoint gives -30 to what it does not
expect. Text in float32 shows that weights, layer order, Mamba's step size and the norms mean the
same to both; at most 3e-6. In BF16 each is rounded in its own way, so pictures and clips, which
vLLM embeds in BF16 whatever it is asked, are held to that: 0.5 to 0.9 % on average. A clip that
loses other tokens to EVS is off by 1.8 % and more. Every patch of the clip changes at every frame
by an amount of its own: where most stand still, rounding alone decides which of them EVS drops.
"""

import json
import random
import urllib.request

import numpy as np
import pytest
import torch

from calibrate.forward import embed, logits
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from calibrate.sources.synthetic.drawing import mp4_bytes
from checkpoint.native import load_model
from serve.ask import content_parts
from serve.demo import draw_page
from serve.settings import ServeSettings


def post(server, path, request):
    """Send a request for the log-probabilities of its own tokens, and one token more."""
    body = {
        "model": server.model,
        "temperature": 0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        **request,
    }
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(sent) as response:
        return json.load(response)


def logprobs(entries):
    """Log-probability of each prompt token but the first; vLLM gives a dictionary by token id for
    each.
    """
    values = [next(iter(entry.values()))["logprob"] for entry in entries[1:]]
    return torch.tensor(values)


def random_ids(config):
    random.seed(0)
    specials = range(config.image_token_id, config.image_token_id + 4)
    text = [token for token in range(16, config.text["vocab_size"]) if token not in specials]
    return [1, *random.choices(text, k=400)]


@torch.no_grad()
def our_logprobs(checkpoint, ids, dtype):
    model = load_model(checkpoint, dtype=dtype)
    given = torch.tensor([ids])
    output = model.language_model(input_ids=given, use_cache=False).logits[0, :-1]
    return output.float().log_softmax(-1).gather(1, given[0, 1:, None])[:, 0]


def assert_bf16_close(ours, theirs):
    difference = (ours - theirs).abs()
    scale = theirs.abs().mean()
    assert difference.mean() < 0.014 * scale
    assert difference.max() < 0.25 * scale


def test_text_agrees_in_float32_to_1e_5(vllm_process, tiny, tiny_checkpoint):
    ids = random_ids(tiny_checkpoint.config)
    settings = ServeSettings(dtype="float32")
    answer, _ = vllm_process.answer(tiny, {"prompt_token_ids": ids}, settings)
    theirs = torch.tensor(answer["logprobs"])
    ours = our_logprobs(tiny_checkpoint, ids, torch.float32)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().mean()


@pytest.mark.server
def test_text_agrees_in_bf16(server, tiny_checkpoint):
    ids = random_ids(tiny_checkpoint.config)
    answer = post(server, "/completions", {"prompt": ids})
    theirs = logprobs(answer["choices"][0]["prompt_logprobs"])
    assert_bf16_close(our_logprobs(tiny_checkpoint, ids, torch.bfloat16), theirs)


@pytest.mark.server
@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_follows_a_picture_or_a_pruned_clip_agrees(kind, server, tiny_checkpoint, tmp_path):
    question = "What is it, and how does it change? " * 8
    if kind == "image":
        draw_page(tmp_path / "a.png")
        parts = content_parts([question], images=[tmp_path / "a.png"])
    else:
        blocks = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 3)).astype(np.uint8)
        (tmp_path / "a.mp4").write_bytes(mp4_bytes(blocks.repeat(64, 1).repeat(64, 2)))
        parts = content_parts([question], videos=[tmp_path / "a.mp4"])
    messages = [{"role": "user", "content": parts}]
    theirs = post(server, "/chat/completions", {"messages": messages})["prompt_logprobs"]
    config = tiny_checkpoint.config
    sample = Sample(kind, messages, "test")
    video = server.settings.video
    assert video.pruning_rate > 0
    prompt = build_prompt(sample, config, tiny_checkpoint.tokenizer, video)
    model = load_model(tiny_checkpoint)
    embedded = embed(model, prompt, config)
    assert len(theirs) == len(embedded.token_ids) == prompt.length
    ours = logits(model, embedded)[:-1].float().log_softmax(-1)
    ours = ours.gather(1, embedded.token_ids[1:, None])[:, 0]
    # The question, and the turn that follows.
    after = len(prompt.token_ids) - prompt.media[-1].span.end
    assert after > 50
    assert_bf16_close(ours[-after:], logprobs(theirs)[-after:])
