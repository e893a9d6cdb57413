"""Answers requests that cannot be sent to the engine with 400 and the reason.

vLLM takes numbers of more than 64 bits, halves of surrogate pairs and values of a wrong type in
some fields of a request (`top_k`, `stop`, `session_id`, `vllm_xargs`), finds out when it tokenizes
them or packs the request for the engine's process, and answers 500 without a word.
What it cannot read at all is `unread_requests`'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.serial_utils import MsgpackEncoder

from hybridquant_vllm import unread_requests

_LARGE = frozenset({"prompt_token_ids", "mm_features", "prompt_embeds"})
"""Fields of the engine's request that vLLM has made itself, of numbers."""

_OBJECTS = ("kv_transfer_params", "ec_transfer_params")
"""What `vllm_xargs` may hold beside single values, for fields of the same names."""

AFTER_SENDING: list[Callable[[Any], None]] = []
"""What is called with the rendered prompt of each request that the engine has been given."""

_add_request = AsyncLLM.add_request


class CheckedInputProcessor(InputProcessor):
    """vLLM's; the identifier, the parameters and the other texts of a request are checked."""

    def process_inputs(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **options: Any
    ) -> Any:
        """Make the engine's request.

        Raises:
            VLLMValidationError: The request holds what cannot be packed; vLLM answers 400.
        """
        check_packable([request_id, params])
        check_objects(params)
        request = super().process_inputs(request_id, prompt, params, *arguments, **options)
        names = set(request.__struct_fields__) - _LARGE
        check_packable([getattr(request, name) for name in sorted(names)])
        return request


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


def check_objects(params: Any) -> None:
    """Check those additional arguments of a request that vLLM takes for objects.

    Raises:
        VLLMValidationError: One is not an object.
    """
    arguments = getattr(params, "extra_args", None) or {}
    for name in _OBJECTS:
        value = arguments.get(name)
        if value is not None and not isinstance(value, dict):
            what = f"`{name}` is not a JSON object but {value!r:.40}"
            raise VLLMValidationError(what, parameter=name)


async def add_request(
    engine: AsyncLLM, request_id: str, prompt: Any, *rest: Any, **options: Any
) -> Any:
    """Give the engine a request as vLLM does.

    Raises:
        VLLMValidationError: vLLM finds a fault of the request, which it would answer with 500
            because it sees the error of any part of the engine in it.
    """
    try:
        queue = await _add_request(engine, request_id, prompt, *rest, **options)
    except VLLMError:
        raise
    except (ValueError, TypeError, *unread_requests.FAULTS) as error:
        raise VLLMValidationError(unread_requests.reason(error)) from error
    unread_requests.note_sent()
    for note in AFTER_SENDING:
        note(prompt)
    return queue


def register() -> None:
    """Let vLLM's server check requests."""
    async_llm.InputProcessor = CheckedInputProcessor
    AsyncLLM.add_request = add_request
    unread_requests.register()
