"""Training uses the prompts, EVS and operations of the served model, and writes its layout."""

import math

import pytest
import torch
from transformers.models.radio.modeling_radio import RadioLayer
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from calibrate.evs import retention_mask
from calibrate.prompts import build_prompt
from calibrate.sources.synthetic.drawing import BAR_END, blank
from calibrate.sources.synthetic.scenes import finished
from checkpoint.libraries import language_model_classes
from checkpoint.native import load_model
from checkpoint.opened import open_bf16
from checkpoint.video import UNPRUNED
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
    fuse_elementwise,
    initialise,
    save_released,
    text_loss,
    without_layer_scale,
    without_pruned,
)
from tiny.training.muon import Muon, orthogonal


@pytest.fixture(scope="module")
def builder(tiny_checkpoint):
    return PromptBuilder(tiny_checkpoint.config, tiny_checkpoint.tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_training_prompts_are_the_served_prompts(task, builder):
    for index, sample in enumerate(items(task, count=3)):
        drawn = scene(task, "test-0", index)
        item = make_item(drawn, task, builder, compressed=True)
        prompt = build_prompt(sample, builder.config, builder.tokenizer, UNPRUNED)
        assert len(item.answers) == 1
        start, end = item.answers[0]
        assert item.token_ids[:start] == prompt.token_ids
        answer = builder.tokenizer.decode(item.token_ids[start:end])
        assert answer == f"{sample.answer}\n<SPECIAL_12>"
        assert len(item.tiles) == len(prompt.tiles) == len(item.labels)


def test_later_turns_are_those_of_the_chat_template(builder):
    drawn = scene("text", "test-0", 3)
    item = make_item(drawn, "text", builder, compressed=False, turns=True)
    conversation = [{"role": "system", "content": "/no_think"}]
    for question, answer in [(drawn.question, drawn.answer), *drawn.more]:
        conversation.append({"role": "user", "content": question})
        conversation.append({"role": "assistant", "content": answer})
    expected = builder.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert builder.tokenizer.decode(item.token_ids) + "\n" == expected


def test_a_batch_holds_the_answer_tokens_of_every_question(builder):
    drawn = scene("text", "test-0", 3)
    item = make_item(drawn, "text", builder, compressed=False, turns=True)
    single = make_item(drawn, "text", builder, compressed=False)
    batch = collate([item, single], builder.config.image_token_id)
    assert len(batch.kinds) == len(drawn.more) + 2
    wanted = batch.tokens[batch.rows, batch.columns]
    start, end = item.answers[0]
    assert wanted[batch.question == 0].tolist() == item.token_ids[start:end]


@pytest.mark.parametrize(
    ("glyph", "link", "names"),
    [
        ("square", "red", ["square", "red"]),
        ("7", "blue", ["7", "blue"]),
        ("K", "B", ["K"]),
        (BAR_END, "B", []),
    ],
)
def test_a_token_is_trained_to_resemble_its_glyph_and_colour(glyph, link, names):
    labels = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    labels[0, 0, 1] = torch.tensor([GLYPH_CLASSES[glyph], 0, LINK_CLASSES[link]])
    alike = torch.zeros(1, 1, len(NAMES), requires_grad=True)
    predicted = torch.zeros(1, 1, 4 * sum(LABEL_SIZES))
    dense_losses(predicted, alike, labels)[0].backward()
    raised = (alike.grad[0, 0] < 0).nonzero()[:, 0].tolist()
    assert sorted(NAMES[place] for place in raised) == sorted(names)


def test_text_loss_ignores_pictures_and_padding():
    following = torch.tensor([[5, 9, 9, 6, 0]])
    logits = torch.full((1, 5, 10), -20.0).scatter(2, following[..., None], 20.0)
    logits[0, 1:3] = 0.0
    logits[0, 4] = 0.0
    assert text_loss(logits, following, visual_id=9) < 1e-6
    logits[0, 3] = 0.0
    assert text_loss(logits, following, visual_id=9) == pytest.approx(math.log(10) / 2)


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9])
def test_pruning_in_a_batch_is_evs(rate):
    torch.manual_seed(0)
    clips = 2
    frames = 5
    per_frame = 16
    text_between = 3
    visual = torch.randn(clips * frames, per_frame, 8).bfloat16()
    length = frames * (per_frame + text_between) + 5
    is_visual = torch.zeros(clips, length, dtype=torch.bool)
    for clip in range(clips):
        for frame in range(frames):
            start = 2 + clip + frame * (per_frame + text_between)
            is_visual[clip, start : start + per_frame] = True
    places = is_visual.flatten().nonzero()[:, 0]
    kept, new = without_pruned(visual, places, length, clips, rate)
    for clip in range(clips):
        of_clip = visual.view(clips, -1, 8)[clip]
        mask = torch.ones_like(is_visual[clip])
        mask[is_visual[clip]] = retention_mask(of_clip, frames, 4, 4, rate)
        assert kept[clip].tolist() == mask.nonzero()[:, 0].tolist()
        assert new[clip][kept[clip]].tolist() == list(range(len(kept[clip])))


def test_labels_are_in_the_patch_of_their_glyph():
    page = blank(512, 512, (255, 255, 255))
    page.text(100, 200, "A7", 48, (0, 0, 0), word=True, link="B")
    labels = patch_labels(finished(page), 32, 32)
    assert labels[12, 116 // 16].tolist() == [GLYPH_CLASSES["A"], 1, 2]
    assert sorted(labels[..., 1].flatten().tolist())[-2:] == [1, 2]


@pytest.fixture
def untrained(tiny_checkpoint):
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    without_layer_scale(model)
    initialise(model, 0)
    return model


def test_the_released_files_hold_the_rounded_model(tiny_config, untrained, tmp_path):
    save_released(untrained, tiny_config, tmp_path / "out")
    written = open_bf16(tmp_path / "out").tensors.read("language_model.lm_head.weight")
    assert torch.equal(written.float(), untrained.language_model.lm_head.weight)


def test_first_layers_attend_to_neighbours(untrained):
    tower = untrained.vision_model
    attention = tower.encoder.layer[0].attention
    width = attention.q_proj.in_features
    position = torch.nn.functional.layer_norm(tower.embeddings.position_embedding[0], (width,))
    query = attention.q_proj(position).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(position).unflatten(-1, (-1, attention.head_dim))
    side = int(len(position) ** 0.5)
    patch = 10 * side + 10
    attended = (query[patch, 0] @ key[:, 0].T).argmax().item()
    assert attended == patch - 1  # head 0 attends to the patch on the left


def test_fused_operations_compute_what_the_served_model_computes(untrained, monkeypatch):
    """Compiling is left out here: it changes the speed, not the results."""
    called = set()

    def not_compiled(function, **_):
        def call(*arguments, **named):
            called.add(function.__qualname__)
            return function(*arguments, **named)

        return call

    native = language_model_classes()
    replaced = [Zamba2RMSNormGated, native.NemotronHRMSNorm, native.NemotronHMLP, RadioLayer]
    for kind in replaced:
        monkeypatch.setattr(kind, "forward", kind.forward)  # restored after the test
    monkeypatch.setattr(native, "causal_conv1d_fn", native.causal_conv1d_fn)
    monkeypatch.setattr(torch, "compile", not_compiled)
    language_model = untrained.language_model.bfloat16()
    token_ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        before = language_model(token_ids, use_cache=False).logits.float()
        fuse_elementwise()
        after = language_model(token_ids, use_cache=False).logits.float()
    assert called == {"_convolved", "_gated_norm", "_norm", "NemotronHMLP.forward"}
    assert (after - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize("shape", [(3, 64, 16), (2, 16, 64)])
def test_orthogonal_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_moves_each_matrix_by_its_orthogonalised_momentum():
    """Fails if PyTorch changes the private _foreach functions that Muon uses."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 4), (4, 6), (8, 4)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    without_gradient = torch.nn.Parameter(torch.ones(2, 2))
    expected = [parameter.detach().clone() for parameter in parameters]
    momenta = [torch.zeros(shape) for shape in shapes]
    optimizer = Muon([*parameters, without_gradient], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            momenta[number] = 0.9 * momenta[number] + 0.1 * gradient
            ahead = 0.1 * gradient + 0.9 * momenta[number]
            update = orthogonal(ahead[None])[0]
            scale = 0.1 * 0.2 * max(parameter.shape) ** 0.5
            expected[number] = (1 - 0.1 * 0.5) * expected[number] - scale * update
        optimizer.step()
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0.02, atol=1e-3)
    assert torch.equal(without_gradient, torch.ones(2, 2))
