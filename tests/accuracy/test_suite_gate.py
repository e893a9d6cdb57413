"""A recipe's gate, servers that die and the EVS curve, on vLLM servers of their own.

The tests share four servers: three of the gate (BF16's first one is killed in mid-run), and one of
the curve, which is killed as well.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ask_suite import kept_answers, plan_of
from editing import edit_tensors

from accuracy.suites import serving
from accuracy.suites.published import published_curve
from accuracy.suites.run import open_suite
from accuracy.suites.serving import Model
from checkpoint.video import Video
from pipeline.suites import measure_suites
from recipes.loading import SHIPPED, load_recipe
from serve import process
from serve.process import ServerDied, ServerProcess, running_server, session_members

pytestmark = [pytest.mark.server, pytest.mark.slow]

TASKS = ("ocrbench", "video_mme", "longvideobench")
MANIFEST = "hybridquant.json"


class Servers:
    """The servers of a run, which are vLLM's own; one is killed when so many answers are kept."""

    def __init__(self) -> None:
        self.started = []
        self.kill_at: dict[int, tuple[Path, int]] = {}
        self.stillborn: set[int] = set()
        self._number = 0

    @contextlib.contextmanager
    def running(self, *arguments, **options):
        number = self._number
        self._number += 1
        with running_server(*arguments, **options) as server:
            self.started.append(server)
            if number not in self.kill_at:
                yield server
                return
            killer = threading.Thread(target=self._kill, args=(server, *self.kill_at[number]))
            killer.start()
            yield server
            killer.join()

    def process(self, *arguments):
        """A process of vLLM; one that is to be stillborn is killed at once."""
        started = ServerProcess(*arguments)
        if self._number - 1 in self.stillborn:
            os.kill(started.pid, signal.SIGKILL)
        return started

    def _kill(self, server, out: Path, answers: int) -> None:
        """Kill the engine, as the system does when memory runs out."""
        deadline = time.monotonic() + 300
        while len(kept_answers(out)) < answers and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in session_members(server.process.pid):
            if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def watched(**planned):
    """Run suites with servers that are recorded, and killed as planned."""
    servers = Servers()
    for name, value in planned.items():
        setattr(servers, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "running_server", servers.running)
        patch.setattr(process, "ServerProcess", servers.process)
        yield servers


def quiet_scales(tensors: dict[str, torch.Tensor]) -> None:
    """Weights that were written with scales of a fifth, as when a scale is inverted or lost."""
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name] / 5


def gate_of(directory: Path) -> dict:
    return json.loads((directory / MANIFEST).read_text())["gate"]


def recipe(output: Path, data: Path, max_loss: float = 1.5, names: tuple[str, ...] = TASKS):
    section = f"names: [{', '.join(names)}], own_data: true, data: {data}, max_loss: {max_loss}"
    overrides = [f"output={output}", f"accuracy.suites={{{section}}}"]
    return load_recipe(SHIPPED / "tiny/fp8.yaml", overrides)


@pytest.fixture(scope="module")
def damaged(fp8, tmp_path_factory) -> Path:
    """The FP8 export with scales of a fifth."""
    directory = Path(shutil.copytree(fp8, tmp_path_factory.mktemp("gate") / "damaged"))
    edit_tensors(directory, quiet_scales)
    return directory


def out_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}-suites")


@pytest.fixture(scope="module")
def measured(damaged, pages, tiny) -> tuple[bool, list]:
    """What the gate says of the damaged export, and the servers that were started for it."""
    planned = {0: (out_of(damaged), 4)}
    with watched(kill_at=planned) as servers:
        passed = measure_suites(recipe(damaged, pages), tiny)
    return passed, servers.started


def test_a_damaged_export_misses_the_gate(measured, damaged):
    passed, _ = measured
    assert not passed
    gate = gate_of(damaged)
    assert gate["passed"] is False
    assert gate["missed"][-1].startswith("the published benchmarks: see ")
    assert "agreement" in gate  # what was measured in process stays
    row = gate["suites"]["variants"][0]["rows"][0]
    assert (row["task"], row["outcome"]) == ("ocrbench", "failed")
    assert row["reference"] > 50
    assert row["variant_failed"] == 0


def test_a_server_that_dies_in_mid_run_is_started_once_more(measured, damaged, tiny):
    """No item is asked twice but those that the server had not answered when it died."""
    _, started = measured
    assert [server.log.stem for server in started] == [tiny.name, f"{tiny.name}-2", damaged.name]
    row = gate_of(damaged)["suites"]["variants"][0]["rows"][0]
    assert row["reference_failed"] == 0
    (file,) = out_of(damaged).glob(f"answers/{tiny.name}-*.jsonl")
    lines = [json.loads(line) for line in file.open()]
    asked = Counter((line["task"], line["item"], line["settings"]) for line in lines)
    assert max(asked.values()) == 1
    # BF16's first server answered some of the items, and its second the others.
    parts = [one for one in gate_of(damaged)["suites"]["asked"] if one["directory"] == tiny.name]
    first, second = (one["items"] for one in parts if one["task"] == "ocrbench")
    assert 4 <= first < 24
    assert first + second == 24


def test_a_gate_that_allows_the_loss_passes_without_asking_again(measured, damaged, pages, tiny):
    before = (damaged / MANIFEST).read_bytes()
    manifest = json.loads(before)
    manifest["gate"] |= {"passed": True, "missed": []}
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with watched() as servers:
        # Three clips that neither side answers right: 95 % certain is a loss of at most 71 points.
        assert measure_suites(recipe(damaged, pages, 75, TASKS[1:]), tiny)
    assert servers.started == []
    gate = gate_of(damaged)
    (damaged / MANIFEST).write_bytes(before)
    assert gate["passed"] is True
    assert {row["outcome"] for row in gate["suites"]["variants"][0]["rows"]} == {"passed"}


@pytest.fixture(scope="module")
def curve(measured, damaged, pages, tiny) -> dict:
    """A curve whose first rate is asked of a server that dies, and whose successor dies too."""
    out = out_of(damaged)
    plan = plan_of(pages, ["video_mme", "longvideobench"], out=out)
    plan = dataclasses.replace(plan, video=Video(), rates=(0.5, 0.75))
    kept = len(kept_answers(out))
    with watched(kill_at={0: (out, kept + 4)}, stillborn={1}) as servers:
        with open_suite(plan, tiny) as run, pytest.raises(ServerDied) as died:
            run.curve([Model(tiny)])
    asked = kept_answers(out)
    with watched() as later:
        short = dataclasses.replace(plan, tasks=plan.tasks[:1])
        with open_suite(short, tiny) as run:
            points = run.curve([Model(tiny)])
    return {
        "died": died.value,
        "servers": servers.started,
        "points": points,
        "asked": asked,
        "kept": kept,
        "later": later.started,
    }


def test_a_server_that_dies_twice_is_reported(curve, tiny):
    first = str(curve["died"]).splitlines()[0]
    assert first.startswith(f"{tiny}: the server died twice: vLLM ended with status -9")


def test_what_a_server_answered_before_it_died_is_kept(curve):
    """Four of six items: the three of the first task, and one of the second."""
    assert len(curve["asked"]) in (curve["kept"] + 4, curve["kept"] + 5)


def test_the_evs_curve_is_asked_of_a_server_at_each_rate(curve, tiny):
    # The gate has asked at 0.75; at 0.5 everything of the first task had been answered.
    assert [server.settings.video.pruning_rate for server in curve["servers"]] == [0.5]
    assert curve["later"] == []
    assert [(point.task, point.rate, point.items) for point in curve["points"]] == [
        ("video_mme", 0.5, 3),
        ("video_mme", 0.75, 3),
    ]
    tokens = {}
    for line in curve["asked"]:
        if line["task"] == "video_mme":
            tokens.setdefault(line["settings"], set()).add(line["prompt_tokens"])
    at_075, at_05 = (max(counts) for counts in list(tokens.values())[-2:])
    assert at_05 > at_075
    assert published_curve("video_mme")["FP8 PTQ"][0.75] == 65.7
    assert not any(point.published for point in curve["points"])  # the data is not the published


def test_without_data_the_result_stays_as_it_is(tiny, fp8_copy, tmp_path, caplog):
    before = gate_of(fp8_copy)
    assert measure_suites(recipe(fp8_copy, tmp_path / "empty"), tiny)
    assert gate_of(fp8_copy) == before
    assert "the benchmarks are not measured" in caplog.text
    assert "--suite report" in caplog.text
