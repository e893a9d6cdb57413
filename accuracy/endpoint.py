"""Asks the items of the tasks through an OpenAI-compatible endpoint and counts failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
from tqdm import tqdm

from calibrate.samples import Sample
from checkpoint.endpoint import connect, first_model
from checkpoint.faults import BadInput, Fault, shortened

MAX_ANSWER_TOKENS = 24
_CONCURRENT_REQUESTS = 8


def ask_endpoint(
    url: str,
    samples: Mapping[str, Sequence[Sample]],
    max_failed: float = 0.02,
    timeout: float = 600.0,
    api_key: str | None = None,
) -> dict[str, list[str | None]]:
    """Ask every item, greedily.

    Args:
        url: Base URL of the server, with or without `/v1`.
        samples: Items by task.
        max_failed: Share of requests that may fail; their answers are None.
        timeout: Seconds for one request.
        api_key: The server's key; from VLLM_API_KEY when None.

    Returns:
        Answers by task in the order of the items.

    Raises:
        BadInput: The server cannot be reached, serves no model, or too many requests fail.
    """
    client = connect(url, api_key, timeout, max_retries=2)
    model = first_model(client)
    reasons: list[str] = []

    def answer(sample: Sample) -> str | None:
        try:
            reply = client.chat.completions.create(
                model=model,
                messages=sample.messages,  # type: ignore[arg-type]
                temperature=0.0,
                max_tokens=MAX_ANSWER_TOKENS,
            )
            return reply.choices[0].message.content
        except (openai.OpenAIError, IndexError, AttributeError, TypeError, ValueError) as error:
            reasons.append(f"{sample.id}: {_one_line(error)}")
            return None

    flat = [sample for items in samples.values() for sample in items]
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        answering = pool.map(answer, flat)
        bar = tqdm(answering, total=len(flat), desc="asking", unit="item", disable=None)
        answers = list(bar)
    if len(reasons) > max_failed * len(flat):
        what = f"{len(reasons)} of {len(flat)} requests failed, at most {max_failed:.0%} may"
        faults = [Fault(url, reason) for reason in reasons[:5]]
        raise BadInput(Fault(url, what, "look at the server's log"), *faults)
    remaining = iter(answers)
    return {task: [next(remaining) for _ in items] for task, items in samples.items()}


def _one_line(error: Exception) -> str:
    return shortened(error) or type(error).__name__
