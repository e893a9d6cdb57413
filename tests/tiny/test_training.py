"""What training sees is what is served: the same prompts, EVS, and released names."""

import math

import pytest
import torch

from calibrate.evs import retention_mask
from calibrate.prompts import build_prompt
from calibrate.sources.synthetic.drawing import BAR_END, blank
from calibrate.sources.synthetic.scenes import finished
from checkpoint.files import check_weights
from checkpoint.native import load_model, load_tokenizer
from tiny.tasks import TASKS, items, scene
from tiny.training.data import collate
from tiny.training.items import PromptBuilder, make_item
from tiny.training.labels import (
    GLYPH_CLASSES,
    LABEL_SIZES,
    LINK_CLASSES,
    NAMES,
    patch_labels,
)
from tiny.training.model import (
    dense_losses,
    initialise,
    save_released,
    text_loss,
    without_layer_scale,
    without_pruned,
)
from tiny.training.muon import orthogonal


@pytest.fixture(scope="module")
def builder(tiny_config):
    return PromptBuilder(tiny_config, load_tokenizer(tiny_config))


@pytest.mark.parametrize("task", TASKS)
def test_training_prompts_are_the_served_prompts(task, builder):
    for index, sample in enumerate(items(task, count=3)):
        drawn = scene(task, "test-0", index)
        item = make_item(drawn, task, builder, compressed=True)
        prompt = build_prompt(sample, builder.config, builder.tokenizer)
        (start, end), *more = item.answers
        assert not more
        assert item.token_ids[:start] == prompt.token_ids
        assert (
            builder.tokenizer.decode(item.token_ids[start:end]) == f"{sample.answer}\n<SPECIAL_12>"
        )
        assert len(item.tiles) == len(prompt.tiles) == len(item.labels)


def test_later_turns_are_those_of_the_chat_template(builder):
    drawn = scene("text", "test-0", 3)
    item = make_item(drawn, "text", builder, compressed=False, turns=True)
    turns = [{"role": "system", "content": "/no_think"}]
    for question, answer in [(drawn.question, drawn.answer), *drawn.more]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = builder.tokenizer.apply_chat_template(turns, tokenize=False)
    assert builder.tokenizer.decode(item.token_ids) + "\n" == expected
    batch = collate(
        [item, make_item(drawn, "text", builder, compressed=False)], builder.config.image_token_id
    )
    assert len(batch.kinds) == len(drawn.more) + 2
    asked = batch.tokens[batch.rows, batch.columns][batch.question == 0].tolist()
    assert asked == item.token_ids[slice(*item.answers[0])]


@pytest.mark.parametrize(
    ("glyph", "link", "names"),
    [
        ("square", "red", ["square", "red"]),
        ("7", "blue", ["7", "blue"]),
        ("K", "B", ["K"]),
        (BAR_END, "B", []),
    ],
)
def test_a_token_is_taught_to_be_alike_to_its_glyph_and_colour(glyph, link, names):
    labels = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    labels[0, 0, 1] = torch.tensor([GLYPH_CLASSES[glyph], 0, LINK_CLASSES[link]])
    alike = torch.zeros(1, 1, len(NAMES), requires_grad=True)
    dense_losses(torch.zeros(1, 1, 4 * sum(LABEL_SIZES)), alike, labels)[0].backward()
    raised = (alike.grad[0, 0] < 0).nonzero()[:, 0].tolist()
    assert sorted(NAMES[place] for place in raised) == sorted(names)


def test_text_loss_leaves_pictures_and_padding_out():
    following = torch.tensor([[5, 9, 9, 6, 0]])
    logits = torch.full((1, 5, 10), -20.0).scatter(2, following[..., None], 20.0)
    logits[0, 1:3] = logits[0, 4] = 0.0
    assert text_loss(logits, following, visual_id=9) < 1e-6
    logits[0, 3] = 0.0
    assert text_loss(logits, following, visual_id=9) == pytest.approx(math.log(10) / 2)


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9])
def test_pruning_in_a_batch_is_evs(rate):
    torch.manual_seed(0)
    clips, frames, each, gap = 2, 5, 16, 3
    visual = torch.randn(clips * frames, each, 8).bfloat16()
    places = torch.zeros(clips, frames * (each + gap) + 5, dtype=torch.bool)
    for clip in range(clips):
        for frame in range(frames):
            start = 2 + clip + frame * (each + gap)
            places[clip, start : start + each] = True
    kept, new = without_pruned(
        visual, places.flatten().nonzero()[:, 0], places.shape[1], clips, rate
    )
    for clip in range(clips):
        mask = torch.ones_like(places[clip])
        mask[places[clip]] = retention_mask(visual.view(clips, -1, 8)[clip], frames, 4, 4, rate)
        assert kept[clip].tolist() == mask.nonzero()[:, 0].tolist()
        assert new[clip][kept[clip]].tolist() == list(range(len(kept[clip])))


def test_labels_stand_in_the_patch_of_their_glyph():
    page = blank(512, 512, (255, 255, 255))
    page.text(100, 200, "A7", 48, (0, 0, 0), word=True, link="B")
    labels = patch_labels(finished(page), 32, 32)
    assert labels[12, 116 // 16].tolist() == [GLYPH_CLASSES["A"], 1, 2]
    assert sorted(labels[..., 1].flatten().tolist())[-2:] == [1, 2]


def test_released_names_and_the_rounded_model_agree(tiny_config, tmp_path):
    model = load_model(tiny_config, dtype=torch.float32)
    without_layer_scale(model)
    initialise(model, 0)
    save_released(model, tiny_config, tmp_path / "out")
    tensors = check_weights(type(tiny_config)(tmp_path / "out", tiny_config.raw))
    own = model.language_model.lm_head.weight
    assert torch.equal(tensors.read("language_model.lm_head.weight").float(), own)


def test_first_layers_look_at_neighbours(tiny_config):
    model = load_model(tiny_config, dtype=torch.float32)
    without_layer_scale(model)
    initialise(model, 0)
    tower = model.vision_model
    attention = tower.encoder.layer[0].attention
    position = torch.nn.functional.layer_norm(
        tower.embeddings.position_embedding[0], (attention.q_proj.in_features,)
    )
    query, key = (project(position).unflatten(-1, (-1, attention.head_dim)) for project in
                  (attention.q_proj, attention.k_proj))  # fmt: skip
    side = int(len(position) ** 0.5)
    patch = 10 * side + 10
    seen = (query[patch, 0] @ key[:, 0].T).argmax().item()
    assert seen == patch - 1  # head 0 looks one to the left


def test_orthogonal():
    for shape in ((3, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(
            orthogonal(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
        )
        assert values.min() > 0.5
        assert values.max() < 1.3
