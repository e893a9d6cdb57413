"""Turns a sample's messages into the text of a prompt, as vLLM's renderer does.

Facts from vLLM 0.32: vllm/renderers/hf.py and vllm/renderers/chat_utils.py. What a server would
drop without a word is refused here.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from calibrate.samples import Sample
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.memory import is_out_of_memory

VIDEO_TOKEN = "<video>"
"""The placeholder of a clip in the rendered text; that of a picture is in config.json."""

Medium = Literal["image", "video"]
MEDIA: tuple[Medium, ...] = ("image", "video")


def template_messages(
    sample: Sample, config: CheckpointConfig
) -> tuple[list[dict[str, Any]], list[tuple[Medium, str]]]:
    """Return the messages as vLLM gives them to the template, and the media in their order.

    Returns:
        The messages, in which a medium is `{"type": kind}`; and (kind, URL) of every medium.

    Raises:
        BadInput: A text contains a placeholder, or a part is neither text, image nor video.
    """
    conversation: list[dict[str, Any]] = []
    urls: list[tuple[Medium, str]] = []
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, str]] = []
        for part in content:
            kind = part["type"].removesuffix("_url")
            if kind == "text":
                _check_no_placeholder(part["text"], sample, config)
                parts.append({"type": "text", "text": part["text"]})
            elif kind in MEDIA:
                value = part[part["type"]]
                urls.append((kind, value["url"] if isinstance(value, dict) else value))
                parts.append({"type": kind})
            else:
                what = f"unknown content part {part['type']!r:.80}"
                raise BadInput(Fault(sample.where, what, "give text, image or video"))
        given: dict[str, Any] = {"role": message["role"], "content": parts}
        conversation.append(given | _template_fields(message, parts))
    return conversation, urls


def _check_no_placeholder(text: str, sample: Sample, config: CheckpointConfig) -> None:
    """Refuse a placeholder in a text: a server would put the next picture there, without a word."""
    for token in (config.raw["img_context_token"], VIDEO_TOKEN):
        if token in text:
            remedy = "write it in another way, and give each medium as a separate part"
            raise BadInput(Fault(sample.where, f"text contains the placeholder {token}", remedy))


def _template_fields(message: dict[str, Any], parts: list[dict[str, str]]) -> dict[str, Any]:
    """The other fields of a message as vLLM gives them to the template.

    (vllm/renderers/chat_utils.py, `_parse_chat_message_content` and `_postprocess_messages`.)
    """
    fields: dict[str, Any] = {}
    for key in ("name", "tool_call_id"):
        if key in message:
            fields[key] = message[key]
    if "reasoning" in message:
        fields["reasoning"] = message["reasoning"]
        fields["reasoning_content"] = message["reasoning"]
    if "tool_calls" in message:
        calls = copy.deepcopy(message["tool_calls"])
        for call in calls:
            arguments = call["function"].get("arguments") or {}
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            call["function"]["arguments"] = arguments
        fields["tool_calls"] = calls
    if message["role"] == "tool" and all(part["type"] == "text" for part in parts):
        fields["content"] = "\n".join(part["text"] for part in parts)
    return fields


def render(
    conversation: list[dict[str, Any]],
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    open_turn: bool,
) -> str:
    """Return the text that the chat template makes of the messages.

    Args:
        conversation: From `template_messages`.
        sample: Its tools are given to the template; faults name it.
        tokenizer: The checkpoint's, with its chat template.
        open_turn: Whether to open the assistant's turn, unless the messages end with one.

    Raises:
        BadInput: There is no message, or the template refuses or ignores some of them.
    """
    if not conversation:
        raise BadInput(Fault(sample.where, "messages is empty", "give at least one message"))
    open_turn = open_turn and conversation[-1]["role"] != "assistant"
    _check_template_knows(conversation, sample, str(tokenizer.chat_template))
    tools: Any = sample.tools
    try:
        text = tokenizer.apply_chat_template(
            conversation, tools=tools, tokenize=False, add_generation_prompt=open_turn
        )
    except Exception as error:  # a template raises whatever its author chose
        if is_out_of_memory(error):
            raise
        what = f"chat template refuses the messages: {shortened(error)}"
        raise BadInput(Fault(sample.where, what, "reorder them")) from None
    return str(text)


def _check_template_knows(
    conversation: list[dict[str, Any]], sample: Sample, template: str
) -> None:
    """Refuse what the template has no place for: a server would drop it without a word."""
    wanted: dict[str, tuple[str, ...]] = {}
    if sample.tools:
        wanted["tools"] = ("tools",)
    for message in conversation:
        if message["role"] == "tool":
            wanted["messages of the role tool"] = ('"tool"', "'tool'")
        if "tool_calls" in message:
            wanted["tool_calls"] = ("tool_calls",)
        if "reasoning" in message:
            wanted["reasoning_content"] = ("reasoning",)
    for name, spellings in wanted.items():
        if not any(spelling in template for spelling in spellings):
            what = f"the chat template ignores {name}, as a server would"
            remedy = "remove the sample, or write it into the content"
            raise BadInput(Fault(sample.where, what, remedy))
