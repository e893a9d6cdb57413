"""Answers requests whose numbers or texts cannot be sent to the engine with 400 and the reason.

vLLM takes numbers of more than 64 bits and halves of surrogate pairs in some fields of a request
(`top_k`, `stop`, `bad_words`, `request_id`), finds out when it tokenizes them or packs the request
for the engine's process, and answers 500 without a word.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import async_llm
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.serial_utils import MsgpackEncoder


class CheckedInputProcessor(InputProcessor):
    """vLLM's; the identifier and the parameters of a request are checked before it."""

    def process_inputs(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **options: Any
    ) -> Any:
        """Make the engine's request.

        Raises:
            VLLMValidationError: The request holds what cannot be packed; vLLM answers 400.
        """
        check_packable([request_id, params])
        return super().process_inputs(request_id, prompt, params, *arguments, **options)


def check_packable(value: Any) -> None:
    """Check that something can be packed as vLLM packs it for the engine.

    Raises:
        VLLMValidationError: It holds a number or a text that cannot be.
    """
    try:
        MsgpackEncoder().encode(value)  # one that is shared would not do for several threads
    except OverflowError:
        raise VLLMValidationError("the request holds a number of more than 64 bits") from None
    except UnicodeEncodeError:
        what = "the request holds half of a surrogate pair, which is no character"
        raise VLLMValidationError(what) from None


def register() -> None:
    """Let vLLM's server check requests."""
    async_llm.InputProcessor = CheckedInputProcessor
