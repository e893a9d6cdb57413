"""Evaluation in training's batches uses every test item once at each pruning rate."""

import torch

from tiny.tasks import TASKS
from tiny.training.data import LENGTHS
from tiny.training.evaluation import PRUNING_RATES, drawn_items, evaluated


def test_every_item_is_evaluated_once_in_few_shapes(tiny_config):
    items = drawn_items(tiny_config.directory, workers=0, count=4)
    counts = {}
    lengths = set()

    def losses(batch, rate):
        for kind in batch.kinds:
            counts[kind, rate] = counts.get((kind, rate), 0) + 1
        lengths.add(batch.tokens.shape[1])
        right = torch.tensor([kind == "document" for kind in batch.kinds])
        return torch.zeros(5), right

    results = evaluated(losses, items, tiny_config.image_token_id)
    expected = {(task, 0.0): 4 for task in TASKS}
    for rate in PRUNING_RATES:
        expected["video_event", rate] = 4
        expected["video_static", rate] = 4
    assert counts == expected
    assert lengths <= set(LENGTHS)
    assert results.pop("document") == 1.0
    assert set(results.values()) == {0.0}
    assert "video_event@0.75" in results
