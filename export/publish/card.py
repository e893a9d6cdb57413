"""Writes the model card of an exported directory: README.md and .eval_results/ for the Hub.

    python -m export.publish.card DIR [--source BF16_DIR] [--base-model ORG/NAME] [--license ID]

The card says what was quantized and what not, how it was calibrated, the accuracy beside BF16's
with intervals, what the verifier found, how to serve it, and its limits. All numbers come from the
manifest and the files. --accuracy FILE uses what hybridquant accuracy wrote with --json or --suite
instead of the gate's numbers, and can be given several times. Licence and base model are taken from
the README.md that the export has from its source, or from a LICENSE file; what is not there has to
be given. That README.md is replaced. Exit status: 0 written; 1 written, and the card
says that the gate, a benchmark or the verification failed; 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import main, raise_if_any
from checkpoint.libraries import prepare_libraries
from checkpoint.log import get_logger
from export.publish.suites import add_accuracy_option, read_accuracy
from export.verify import first_faults

logger = get_logger("card")

# export.publish.facts and model_card are imported in functions: they import ModelOpt, which takes
# seconds, and which a command has to prepare first.


def add_origin_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `find_origin` reads."""
    parser.add_argument("--base-model", metavar="ORG/NAME", help="what was quantized, on the Hub")
    parser.add_argument("--license", metavar="ID", help="the Hub's identifier, or other")
    parser.add_argument("--license-name", metavar="NAME", help="its name, for other")
    parser.add_argument("--license-link", metavar="URL", help="where it can be read, for other")


def _run(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("export.publish.card", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--source", type=Path, metavar="BF16_DIR", help="verify against the source as well"
    )
    add_origin_options(parser)
    parser.add_argument("--name", metavar="ORG/NAME", help="where it will be on the Hub (DIR)")
    add_accuracy_option(parser)
    parsed = parse_command(parser, arguments)
    # What is no checkpoint is reported before torch is imported.
    raise_if_any(first_faults(parsed.directory, parsed.source))
    read_config(parsed.directory)
    tasks, benchmarks = read_accuracy(parsed.accuracy, parsed.directory)
    prepare_libraries()
    from export.publish import model_card
    from export.publish.facts import read_facts

    facts = read_facts(parsed.directory, tasks=tasks, benchmarks=benchmarks)
    origin = model_card.find_origin(facts, parsed)
    verdict = model_card.find_verdict(parsed.directory, parsed.source)
    text = model_card.card_text(facts, origin, verdict, parsed.name or facts.name)
    model_card.write_card(facts, text)
    logger.info("wrote %s", parsed.directory / model_card.README)
    for fault in verdict.faults[:1]:
        logger.warning("the card says that the verification failed: %s", fault)
    if facts.has_failed:
        logger.warning("the card says that the gate failed, or that a benchmark has lost too much")
    return 1 if verdict.faults or facts.has_failed else 0


if __name__ == "__main__":
    main(_run)
