"""Writes one HTML page about an exported directory, complete in itself.

    python -m export.publish.report DIR [--source BF16_DIR] [--output FILE]

The page shows the hybrid stack, a column a layer, with kind, format and error; sizes before and
after; accuracy against BF16 with intervals; what was calibrated on; warnings; how to serve. With
--source the errors of the weights are measured, and the verifier compares them with it. --accuracy
FILE takes what hybridquant accuracy has written with --json or --suite, and can be given for
several files; --sweep FILE and --bench FILE take measurements whose shapes
export/publish/measured.py declares. Exit status: 0 written; 1 written, and the page says that the
gate, a benchmark or the verification failed; 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.atomic import write_text
from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import main, raise_if_any
from checkpoint.libraries import prepare_libraries
from checkpoint.log import get_logger
from export.publish.suites import add_accuracy_option, read_accuracy
from export.verify import first_faults

if TYPE_CHECKING:
    from export.publish.facts import Facts
    from export.publish.measured import Bench, Sweep
    from export.publish.model_card import Verdict

logger = get_logger("report")

# What imports ModelOpt is imported in functions: it takes seconds, and a command prepares it first.

REPORT = "report.html"

_FEW_SAMPLES = 128
"""Calibration samples below which the page warns; the technical report used 1,024."""


def report_text(
    facts: Facts, verdict: Verdict, sweep: Sweep | None = None, bench: Bench | None = None
) -> str:
    """Return the page. The same facts give the same page.

    Args:
        facts: The export's.
        verdict: What the verifier found.
        sweep: Accuracy and time against the EVS rate, if measured.
        bench: Throughput, if measured.
    """
    from export.publish import charts
    from export.publish.recorded import mean_task, overall_agreement
    from export.publish.serving import kernels, serve_commands
    from export.publish.templates import render_html

    whiskers, limit = charts.whiskers(facts.tasks)
    benchmarks = []
    for outcome in facts.benchmarks:
        placed, axis = charts.whiskers(outcome.tasks)
        rows = list(zip(outcome.rows, placed, strict=True))
        benchmarks.append(
            {
                "outcome": outcome,
                "rows": rows,
                "limit": axis,
                "curves": charts.benchmark_curves(outcome.curves),
            }
        )
    return render_html(
        "report.html.jinja",
        facts=facts,
        verdict=verdict,
        warnings=list(page_warnings(facts, verdict)),
        stack=charts.stack_chart(facts.layers),
        format_code=charts.format_code,
        tasks=list(zip(facts.tasks, whiskers, strict=True)),
        limit=limit,
        benchmarks=benchmarks,
        mean=mean_task(facts.all_tasks),
        overall=overall_agreement(facts.agreement),
        sweep=sweep,
        accuracy_curve=charts.accuracy_curve(sweep) if sweep else None,
        first_token_curve=charts.first_token_curve(sweep) if sweep else None,
        bench=bench,
        commands=serve_commands(facts, facts.name),
        kernels=kernels(facts),
    )


def page_warnings(facts: Facts, verdict: Verdict) -> Iterator[str]:
    """Yield what a reader must not overlook, a sentence each."""
    if verdict.faults:
        yield f"Verification found {len(verdict.faults)} faults, such as: {verdict.faults[0]}"
    if facts.gate_passed is None:
        yield "The accuracy gate was not measured."
    if facts.gate_passed is False:
        yield f"The accuracy gate failed: {'; '.join(facts.missed) or 'no reason is recorded'}."
    if not verdict.compared:
        yield "Weights were not compared with the source here: give --source BF16_DIR."
    for outcome in facts.benchmarks:
        if outcome.missed:
            named = [f"{row.task.name} ({row.outcome})" for row in outcome.missed]
            yield f"Not every published benchmark passed its gate: {', '.join(named)}."
    if not facts.tasks and not facts.benchmarks:
        yield "No task was answered: accuracy is known from next-token agreement only."
    samples = facts.calibration.get("samples")
    if samples is not None and samples < _FEW_SAMPLES:
        yield f"Calibrated on {samples} samples; the published recipe takes 1,024."
    if facts.calibration.get("skipped"):
        yield f"{facts.calibration['skipped']} calibration samples were skipped."
    if facts.trained:
        yield f"{facts.trained} tensors were trained: they are not the source's."


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export.publish.report", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--source", type=Path, metavar="BF16_DIR", help="measure errors against it")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page (DIR/{REPORT})")
    add_accuracy_option(parser)
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="measured EVS rates")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="measured throughput")
    return parser


def _run(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_command(_parser(), arguments)
    # What is no checkpoint is reported before torch is imported.
    raise_if_any(first_faults(parsed.directory, parsed.source))
    read_config(parsed.directory)
    from export.publish.measured import read_bench, read_sweep

    sweep = read_sweep(parsed.sweep, parsed.directory.resolve().name) if parsed.sweep else None
    bench = read_bench(parsed.bench) if parsed.bench else None
    tasks, benchmarks = read_accuracy(parsed.accuracy, parsed.directory)
    prepare_libraries()
    from export.publish.errors import weight_errors
    from export.publish.facts import read_facts
    from export.publish.model_card import find_verdict

    errors = weight_errors(parsed.directory, parsed.source) if parsed.source else None
    facts = read_facts(parsed.directory, errors, tasks, benchmarks)
    verdict = find_verdict(parsed.directory, parsed.source)
    output = parsed.output or parsed.directory / REPORT
    write_text(output, report_text(facts, verdict, sweep, bench))
    logger.info("wrote %s", output)
    for warning in page_warnings(facts, verdict):
        logger.warning("%s", warning)
    return 1 if verdict.faults or facts.has_failed else 0


if __name__ == "__main__":
    main(_run)
