"""Opens what a recipe names: checkpoint, device, samples."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from accuracy.settings import Accuracy
from calibrate.prompts import Prompt, build_prompts
from calibrate.samples import Sample, Skipped
from calibrate.settings import Calibrate
from calibrate.sources.mixing import mixed, shuffled
from calibrate.sources.source import Source
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.opened import Checkpoint, check_companions, open_bf16
from checkpoint.processes import local_gpu
from checkpoint.run_state import file_digest, file_stamp
from checkpoint.video import Video
from quantize.distill.settings import Distill
from recipes.schema import TINY, Recipe
from serve.companions import auto_map_faults, generation_faults
from tiny.checkpoint import tiny_checkpoint


def open_source(recipe: Recipe) -> Checkpoint:
    """Open the recipe's BF16 checkpoint; `tiny` is written beside the output if it is not there.

    Raises:
        BadInput: It is not a BF16 checkpoint of a known architecture.
    """
    if recipe.model != TINY:
        checkpoint = open_bf16(recipe.model)
    else:
        directory = recipe.output.parent / "tiny-bf16"
        if recipe.output.absolute() == directory.absolute():
            what = f"{directory} is where the tiny checkpoint itself is written"
            raise BadInput(Fault("output", what, "give another one"))
        checkpoint = open_bf16(tiny_checkpoint(directory).directory)
    check_companions(checkpoint)
    # What the export copies must be what a server takes.
    directory = checkpoint.directory
    raise_if_any([*auto_map_faults(directory), *generation_faults(directory)])
    return checkpoint


def pick_device(name: str | None) -> str:
    """Return the named device, or by default the GPU if there is one.

    Under a launcher, a process takes the GPU of its local rank.

    Raises:
        BadInput: torch has no such device.
    """
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        number = local_gpu()
        if number is None:
            return "cuda"
        torch.cuda.set_device(number)
        return f"cuda:{number}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shortened(str(error).partition("\n")[0])
        remedy = "give cpu, cuda or cuda:N, or leave it out"
        raise BadInput(Fault("device", f"{name!r:.80}: {reason}", remedy)) from None
    return name


def prompts_of(
    section: Calibrate | Accuracy,
    name: str,
    checkpoint: Checkpoint,
    video: Video,
    skipped: Skipped,
    max_length: int | None = None,
) -> Iterator[Prompt]:
    """Yield a section's samples as prompts; the first is built at once.

    Args:
        section: With sources, number of samples and seed.
        name: The section's name, for messages.
        checkpoint: Gives tokenizer and sizes.
        video: How clips are sampled and pruned.
        skipped: Takes the samples that cannot be used.
        max_length: Most tokens of a prompt; by default the model's context.

    Raises:
        BadInput: At once if a source does not exist, is empty or begins with a sample that cannot
            be used; later if more samples are bad than `skipped` allows.
    """
    config = checkpoint.config
    limit = min(max_length or config.max_length, config.max_length)
    prompts = build_prompts(
        _mixed_samples(section, f"{name}.sources", skipped),
        config,
        checkpoint.tokenizer,
        video,
        count=section.samples,
        skipped=skipped,
        max_length=limit,
        name=f"{name}.sources",
    )
    first = next(prompts)
    return itertools.chain([first], prompts)


def available_samples(section: Calibrate | Accuracy) -> int:
    """How many samples a section's sources hold, as far as that is known, of those asked for."""
    total = sum(source.count(section.samples) for source in section.sources)
    return min(section.samples, total)


def training_samples(section: Distill, skipped: Skipped) -> Iterator[Sample]:
    """Yield one pass over the samples of a distillation, the same at every call.

    Args:
        section: With sources, number of samples and seed.
        skipped: Takes the rows that are no samples, of all passes.
    """
    return shuffled(_mixed_samples(section, "distill.sources", skipped), section.seed)


def training_sample_faults(section: Distill) -> Iterator[Fault]:
    """Yield a fault when the sources have no sample to train on beside those that are held out.

    Rows that cannot be used are counted too: a training that meets only those stops later.
    """
    total = sum(source.count(section.held_out + 1) for source in section.sources)
    if total <= section.held_out:
        what = f"hold {total} samples, and distill.held_out keeps {section.held_out} apart"
        yield Fault("distill.sources", what, "give more samples, or lower distill.held_out")


def trained_on_sources(trained: Distill, judged: Accuracy) -> list[str]:
    """Return the sources of the gate's samples that a distillation is given too, as a user would
    name them.

    Synthetic samples differ by their seeds; rows of a file or a dataset do not.
    """
    shared = []
    files = {path.resolve() for source in trained.sources for path in source.files()}
    names = {getattr(source, "name", None) for source in trained.sources}
    for source in judged.sources:
        shared += [str(path) for path in source.files() if path.resolve() in files]
        name = getattr(source, "name", None)
        if name is not None and name in names and not source.files():
            shared.append(name)
    return shared


def _mixed_samples(
    section: Calibrate | Accuracy | Distill, name: str, skipped: Skipped
) -> Iterator[Sample]:
    parts = []
    for source in section.sources:
        samples = source.read(section.samples, section.seed, skipped)
        parts.append((_begun(samples), source.weight))
    return mixed(parts, seed=section.seed, name=name)


def _begun(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Read the first sample now, so that a missing source is reported before weights are loaded."""
    first = list(itertools.islice(samples, 1))
    return itertools.chain(first, samples)


def source_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every file that a recipe's samples come from, by path."""
    files = {path for source in recipe.sources() for path in source.files()}
    return {str(path): file_digest(path) for path in sorted(files)}


def media_digests(recipe: Recipe) -> dict[str, str]:
    """Tell the pictures and clips that a recipe's rows name from others, by their folder.

    By their size and the time of their last change, as the weights of the source: a training may
    have terabytes of clips, and each process looks at all of them whenever it starts. Rows that a
    run will not get to are left out; bad rows and files that are missing are reported by what
    reads them.
    """
    files: set[Path] = set()
    for section in recipe.sampled_sections():
        for source in section.sources:
            if source.files():
                files.update(_media_files(source, section))
    by_folder: dict[Path, list[tuple[str, list[int]]]] = {}
    for path in sorted(files):
        by_folder.setdefault(path.parent, []).append((path.name, file_stamp(path)))
    return {str(folder): _stamps_digest(stamps) for folder, stamps in by_folder.items()}


def _media_files(source: Source, section: Calibrate | Accuracy | Distill) -> Iterator[Path]:
    """The files that the samples of a source name, as far as a run may get."""
    with contextlib.suppress(BadInput):
        samples = source.read(section.samples, section.seed, Skipped(sys.maxsize))
        # Samples that are too long or broken are skipped, and others take their place.
        for sample in itertools.islice(samples, 2 * section.samples):
            yield from sample.media_files()


def _stamps_digest(stamps: list[tuple[str, list[int]]]) -> str:
    """Describe files so that a difference says how many there are, and which has changed last."""
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    newest = max(stamps, key=lambda entry: entry[1][-1:])[0]
    number = "1 file" if len(stamps) == 1 else f"{len(stamps)} files"
    return f"{number}, newest {shortened(newest, 60)} ({digest[:12]})"
