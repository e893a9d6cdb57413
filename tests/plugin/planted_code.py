"""Runs in the serve environment: prepares checkpoints as `vllm serve` does, up to the processor.

    python tests/plugin/planted_code.py CHECKPOINT…

Prints the class of each configuration, and what each chat template comes to.
"""

import sys

from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import renderer_from_config

if __name__ == "__main__":
    for directory in sys.argv[1:]:
        config = EngineArgs(directory, max_model_len=65536).create_engine_config()
        renderer = renderer_from_config(config)
        assert renderer.mm_processor is not None
        print(type(config.model_config.hf_config).__name__)
        try:
            chat = [{"role": "user", "content": "a"}]
            print(repr(renderer.get_tokenizer().apply_chat_template(chat, tokenize=False)))
        except Exception as error:
            print(type(error).__name__)
