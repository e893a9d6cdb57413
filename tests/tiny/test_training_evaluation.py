"""Evaluation in training's batches asks every test item once at each pruning rate."""

import torch

from tiny.tasks import TASKS
from tiny.training.data import LENGTHS
from tiny.training.evaluation import PRUNING_RATES, drawn_items, evaluated


def test_every_item_is_asked_once_in_few_shapes(tiny_config):
    items = drawn_items(tiny_config.directory, workers=0, count=4)
    asked, shapes = (
        dict.fromkeys([(task, rate) for task in TASKS for rate in PRUNING_RATES], 0),
        set(),
    )

    def losses(batch, rate):
        for kind in batch.kinds:
            asked[kind, rate] += 1
        shapes.add(batch.tokens.shape[1])
        return torch.zeros(5), torch.tensor([kind == "document" for kind in batch.kinds])

    results = evaluated(losses, items, tiny_config.image_token_id)
    assert shapes <= set(LENGTHS)
    assert all(
        number == (4 if rate == 0 or task.startswith("video") else 0)
        for (task, rate), number in asked.items()
    )
    assert results.pop("document") == 1.0
    assert set(results.values()) == {0.0}
    assert "video_event@0.75" in results
