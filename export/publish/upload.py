"""Uploads an exported directory to the Hugging Face Hub.

    python -m export.publish.upload DIR ORG/NAME [--private] [--revision BRANCH] [--dry-run]

Sends the files of the manifest, the model card (written first where README.md is still the
source's), .eval_results/ and report.html; nothing else that lies in DIR. A directory with faults,
or whose gate failed or was not measured, is refused; --anyway sends it, and the card says so. Run
the same command again after an interruption: what was sent is not sent again. At the end the hashes
on the Hub are compared with the files, and the page's URL is printed. The token is the one of
HF_TOKEN or hf auth login. Exit status: 0 sent and compared; 1 refused, or a hash differs; 2 bad
input, and whatever the Hub or the connection refuses.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants

from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import Fault, main, raise_if_any
from checkpoint.libraries import prepare_libraries
from checkpoint.log import get_logger
from checkpoint.reading import checkpoint_file_fault
from export.publish.card import add_origin_options
from export.publish.hub import (
    MAIN,
    Target,
    check_login,
    check_target,
    hub_errors,
    open_repository,
    remote_faults,
)
from export.publish.report import REPORT

if TYPE_CHECKING:
    from export.publish.facts import Facts
    from export.publish.model_card import Verdict

logger = get_logger("upload")

# export.publish.facts and model_card are imported in functions: they import ModelOpt, which takes
# seconds, and which a command has to prepare first.


def uploaded_files(facts: Facts) -> list[str]:
    """Return the files that are sent, by relative path, in order.

    They are those that the manifest records. One of an older version records none: then they are
    the weights and what an export writes and copies.

    Raises:
        BadInput: A recorded file is missing, or is not a file of the directory.
    """
    from checkpoint.content import MANIFEST
    from export.publish.model_card import EVAL_RESULTS, README

    names = set(facts.files) or _files_of_an_export(facts.directory)
    faults = [checkpoint_file_fault(facts.directory / name, facts.directory) for name in names]
    raise_if_any(fault for fault in faults if fault is not None)
    for name in (MANIFEST, README, EVAL_RESULTS, REPORT):
        if (facts.directory / name).is_file():
            names.add(name)
    return sorted(names)


def _files_of_an_export(directory: Path) -> set[str]:
    from checkpoint.companions import find_companions
    from checkpoint.files import TensorFiles
    from checkpoint.other_weights import INDEX

    weights = TensorFiles(directory).files
    companions = find_companions(directory, tuple(weights))
    names = {*weights, *companions.digests, "config.json"}
    for name in (INDEX, "hf_quant_config.json", "sensitivity.json"):
        if (directory / name).is_file():
            names.add(name)
    return names


def refusals(facts: Facts, verdict: Verdict) -> Iterator[str]:
    """Yield why a directory should not be published, a sentence each."""
    if verdict.faults:
        yield f"verification found {len(verdict.faults)} faults, such as {verdict.faults[0]}"
    if facts.gate_passed is None:
        yield "the accuracy gate was not measured"
    if facts.gate_passed is False:
        yield f"the accuracy gate failed: {'; '.join(facts.missed) or 'no reason is recorded'}"


def send(facts: Facts, target: Target, names: list[str]) -> list[Fault]:
    """Create the repository, send the files, and compare what the Hub holds.

    Args:
        facts: The export's.
        target: Where it goes.
        names: Files, by relative path.

    Returns:
        One fault for each file that differs on the Hub.

    Raises:
        BadInput: Whatever the Hub or the connection refuses, in one sentence.
    """
    check_login()
    api = HfApi(endpoint=hub_endpoint())
    with hub_errors(target):
        open_repository(api, target, set(names))
        api.upload_folder(
            repo_id=target.name,
            folder_path=facts.directory,
            revision=target.revision,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=f"{facts.format_names} by hybridquant",
        )
        return list(remote_faults(api, target, facts.directory, names, facts.files))


def hub_endpoint() -> str:
    """Return the Hub's address: that of HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _prepare_card(facts: Facts, verdict: Verdict, parsed: argparse.Namespace, notice: str) -> bool:
    """Write the card where README.md is not ours yet, or must say why it is sent anyway.

    Returns:
        Whether it has to be written. With --dry-run it is not.

    Raises:
        BadInput: Base model or licence are not known.
    """
    from export.publish import model_card

    if model_card.is_our_card(facts.directory) and not notice:
        return False
    origin = model_card.find_origin(facts, parsed)
    text = model_card.card_text(facts, origin, verdict, parsed.name, notice)
    if not parsed.dry_run:
        model_card.write_card(facts, text)
        logger.info("wrote %s", facts.directory / model_card.README)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export.publish.upload", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("name", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true", help="the repository must be private")
    parser.add_argument("--revision", default=MAIN, metavar="BRANCH", help="a branch, or refs/pr/N")
    parser.add_argument("--dry-run", action="store_true", help="check, and list what would be sent")
    parser.add_argument(
        "--anyway", action="store_true", help="send it with faults; the card says so"
    )
    parser.add_argument(
        "--source", type=Path, metavar="BF16_DIR", help="verify against the source as well"
    )
    add_origin_options(parser)
    return parser


def _run(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_command(_parser(), arguments)
    target = Target(parsed.name, parsed.revision, parsed.private)
    check_target(target)
    read_config(parsed.directory)  # what is no checkpoint is reported before torch is imported
    if not parsed.dry_run:
        check_login()
    prepare_libraries()
    from export.publish.facts import read_facts
    from export.publish.model_card import EVAL_RESULTS, README, find_verdict

    facts = read_facts(parsed.directory)
    verdict = find_verdict(parsed.directory, parsed.source)
    reasons = list(refusals(facts, verdict))
    for reason in reasons:
        logger.warning("%s: %s", parsed.directory, reason)
    if reasons and not parsed.anyway:
        logger.error("not uploaded: repair it, or give --anyway, and the model card says so")
        return 1
    notice = f"Uploaded although {'; and '.join(reasons)}." if reasons else ""
    writes_card = _prepare_card(facts, verdict, parsed, notice)
    names = uploaded_files(facts)
    if parsed.dry_run:
        if writes_card:
            written = {README, EVAL_RESULTS} if facts.all_tasks else {README}
            names = sorted({*names, *written})
            logger.info("%s would be written anew", " and ".join(sorted(written)))
        return _show(facts, names, target)
    faults = send(facts, target, names)
    for fault in faults:
        logger.error("%s", fault)
    print(target.url(hub_endpoint()))
    return 1 if faults else 0


def _show(facts: Facts, names: list[str], target: Target) -> int:
    """Print what would be sent, and where."""
    total = 0
    for name in names:
        path = facts.directory / name
        size = path.stat().st_size if path.is_file() else 0
        total += size
        print(f"{size:>15,}  {name}")
    print(f"{total:>15,}  bytes in {len(names)} files to {target.url(hub_endpoint())}")
    return 0


if __name__ == "__main__":
    main(_run)
