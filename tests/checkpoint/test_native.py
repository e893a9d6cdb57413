"""What loading a model sets in the process."""

import torch

from checkpoint.native import load_model


def test_cudnn_attention_is_off_once_a_model_is_loaded(tiny_checkpoint):
    """Trap: on Hopper it comes first, and plans every new length of a prompt anew."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(tiny_checkpoint)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
