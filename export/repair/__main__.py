"""Repairs an exported directory without calibration, says what it changed, and verifies it.

    python -m export.repair DIR [--source BF16_DIR]

Repairs a corrupted, too wide or too narrow exclude list; a quantization section or an
hf_quant_config.json that is missing, or says other than the tensors; manifests of version 0.1. With
--source also files beside the weights and tensors in BF16 that are missing or not the source's,
keys of config.json, and the directories that ModelOpt's own exporter writes, with transformers'
names and without the vision tower. Quantized weights and scales are never changed. The directory is
replaced as a whole when the verifier finds no fault in the result; otherwise nothing is changed.
Exit status: 0 repaired, or there was nothing to repair; 1 it cannot be repaired; 2 bad input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main, raise_if_any
from checkpoint.libraries import prepare_libraries
from export.verify import first_faults, show_faults


def _run(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("export.repair", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--source", type=Path, metavar="BF16_DIR", help="what it was made from, to take files from"
    )
    parsed = parse_command(parser, arguments)
    directory = parsed.directory.resolve()
    from export.repair.staging import restore_interrupted

    restore_interrupted(directory)
    raise_if_any(first_faults(parsed.directory, parsed.source))
    prepare_libraries()
    from export.repair.directory import CannotRepair, repair

    try:
        changes = repair(directory, parsed.source)
    except CannotRepair as error:
        show_faults(directory, list(error.faults))
        print(f"{parsed.directory}: cannot be repaired, nothing was changed")
        return 1
    for change in changes:
        print(change)
    if changes:
        print(f"{parsed.directory}: repaired and verified")
    else:
        print(f"{parsed.directory}: there is nothing to repair")
    return 0


if __name__ == "__main__":
    main(_run)
