"""Runs in the serve environment, with the plug-in's sources: what vLLM answers to URLs of media.

    python tests/plugin/fetch_media.py CASES.json

CASES.json holds by name: a URL, the directory and the hosts that are allowed, or null. Prints by
name the HTTP status that vLLM gives, and the reason. See test_fetching.py.
"""

import asyncio
import json
import sys
from pathlib import Path

from vllm import envs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

import hybridquant_vllm


async def answer(case: dict) -> tuple[int, str]:
    """Fetch one picture; the status is vLLM's, 200 where it was read."""
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        allowed_local_media_path=case["directory"] or "",
        allowed_media_domains=case["hosts"],
    )
    try:
        await connector.fetch_image_async(case["url"])
    except Exception as error:
        found = create_error_response(error).error
        return found.code, found.message
    return 200, ""


async def main() -> None:
    """All at once: vLLM tries some of them again after a while."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    answers = await asyncio.gather(*map(answer, cases.values()))
    print(json.dumps(dict(zip(cases, answers, strict=True))))


hybridquant_vllm.register()
asyncio.run(main())
