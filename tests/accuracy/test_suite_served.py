"""A suite on real vLLM: the tiny checkpoint reads codes of its own task, in OCRBench's format, and
looks at clips in Video-MME's. One server answers for both sides.
"""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from ask_suite import answered_requests, kept_answers, plan_of
from suite_data import picture, write_ocrbench_pictures, write_text_task

from accuracy.suites.asking import REASONING_ON
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource
from accuracy.suites.run import open_suite
from accuracy.suites.serving import Model
from tiny.tasks import items

pytestmark = pytest.mark.server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CODES = 24


def test_scores_of_served_answers_are_those_worked_out_by_hand(pages, server, tiny, tmp_path):
    plan = plan_of(pages, ["ocrbench", "video_mme"], concurrency=8, out=tmp_path)
    model = Model(tiny, server.url)
    with open_suite(plan, tiny) as run:
        scores = run.scores(model, plan.video)
    kept = kept_answers(tmp_path)
    expected = {
        str(number): sample.answer for number, sample in enumerate(items("document", count=CODES))
    }
    by_hand = {}
    for line in kept:
        if line["task"] == "ocrbench":
            answer = expected[line["item"]]
            by_hand[line["item"]] = float(answer.lower() in line["answer"].lower())
    assert scores["ocrbench"].scores == by_hand
    assert sum(by_hand.values()) > CODES / 2  # the tiny checkpoint was trained to read them
    clips = [line for line in kept if line["task"] == "video_mme"]
    assert len(clips) == 3
    assert all(line["prompt_tokens"] > 100 and line["answer"] for line in clips)


def test_a_text_task_of_lm_eval_is_scored_as_by_hand(server, tiny, tmp_path):
    """The right answers are chosen after a first round: two numbers that were given, two not."""
    plan = plan_of(tmp_path, ["chartqa"])
    source = DataSource(tmp_path, tasks_folder=tmp_path / "tasks")
    plan = dataclasses.replace(plan, tasks=choose_tasks("text", ["small_sums"]), source=source)
    model = Model(tiny, server.url)
    right = ["0"] * 4
    for _ in range(2):
        write_text_task(tmp_path / "tasks", right)
        with open_suite(plan, tiny) as run:
            scores = run.scores(model, plan.video)["small_sums"].scores
        kept = kept_answers(tmp_path / "out")
        numbers = {line["item"]: re.findall(r"-?[0-9]+", line["answer"]) for line in kept}
        given = [numbers[f"small_sums/{number}"] for number in range(4)]
        by_hand = {}
        for number, found in enumerate(given):
            is_right = bool(found) and found[-1] == right[number]
            by_hand[f"small_sums/{number}"] = float(is_right)
        assert scores == by_hand
        right = [found[-1] if found and place < 2 else "-1" for place, found in enumerate(given)]
    assert sum(scores.values()) == 2
    assert all(line["prompt_tokens"] for line in kept)


def test_a_killed_run_resumes_without_asking_an_answered_item_again(pages, server, tiny, tmp_path):
    script = [sys.executable, str(HERE / "ask_suite.py")]
    command = [*script, *map(str, (pages, tmp_path, tiny, server.url))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = answered_requests(server.url)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as run:
        deadline = time.monotonic() + 120
        while len(kept_answers(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    killed_after = len(kept_answers(tmp_path))
    assert 4 <= killed_after < CODES
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(CODES), done.stderr
    asked = Counter(line["item"] for line in kept_answers(tmp_path))
    assert len(asked) == CODES
    assert set(asked.values()) == {1}
    # The server agrees: beside one answer for each item, that of the request that the kill cut off.
    assert answered_requests(server.url) - before in (CODES, CODES + 1)


def test_a_failed_request_is_neither_right_nor_wrong_and_is_asked_again(server, tiny, tmp_path):
    """A question longer than the context is refused by the server."""
    samples = items("document", count=3)
    rows = []
    for sample in samples:
        page, question = sample.messages[-1]["content"]
        encoded = page["image_url"]["url"].partition(",")[2]
        rows.append((encoded, question["text"], sample.answer))
    rows.append((picture("long"), "Which code? " * 60_000, "none"))
    write_ocrbench_pictures(tmp_path, rows)
    with open_suite(plan_of(tmp_path, ["ocrbench"], concurrency=4), tiny) as run:
        for _ in range(2):
            found = run.scores(Model(tiny, server.url), run.plan.video)["ocrbench"]
            assert (found.asked, found.failed) == (4, 1)
            assert set(found.scores) == {"0", "1", "2"}
            assert "400" in found.reasons[0]
    asked = Counter(line["item"] for line in kept_answers(tmp_path / "out"))
    assert asked == {"0": 1, "1": 1, "2": 1, "3": 2}
    assert [one.failed for one in run.asked] == [1, 1]


def test_with_reasoning_what_follows_it_is_scored(pages, server, tiny, tmp_path):
    """The tiny checkpoint was not trained to reason; now and then it closes its reasoning."""
    profile = dataclasses.replace(REASONING_ON, max_tokens=12)
    plan = plan_of(pages, ["ocrbench"], concurrency=8, out=tmp_path)
    with open_suite(dataclasses.replace(plan, profile=profile), tiny) as run:
        scores = run.scores(Model(tiny, server.url), plan.video)["ocrbench"]
    with open_suite(plan, tiny) as run:
        run.scores(Model(tiny, server.url), plan.video)
    expected = [sample.answer.lower() for sample in items("document", count=CODES)]
    lines = kept_answers(tmp_path)
    thought, plain = lines[:CODES], lines[CODES:]
    by_hand = {}
    for line in thought:
        reasoned, _, answer = line["answer"].rpartition("</think>")
        was_cut_off = not reasoned and line["finish_reason"] == "length"
        seen = "" if was_cut_off else answer
        by_hand[line["item"]] = float(expected[int(line["item"])] in seen.lower())
    assert scores.scores == by_hand
    assert scores.truncated == sum(line["finish_reason"] == "length" for line in thought)
    # The system message reached the template: it leaves the reasoning open.
    shorter = {line["item"]: line["prompt_tokens"] for line in thought}
    assert all(line["prompt_tokens"] != shorter[line["item"]] for line in plain)


def test_requests_at_a_time_are_measured_until_the_server_is_busy(pages, server, tiny, tmp_path):
    plan = plan_of(pages, ["ocrbench"], concurrency=None, repeats=2, out=tmp_path)
    with open_suite(plan, tiny) as run:
        run.scores(Model(tiny, server.url), plan.video, repeats=2)
        noise = run.noise(Model(tiny, server.url))
    first, second = run.asked
    assert [step.at_once for step in first.steps] == [8]
    assert first.steps[0].answers == 16  # of 24; the first eight are not counted
    assert first.steps[0].running is not None
    # Twice as many are tried next, unless requests waited in the server at every reading.
    assert first.at_once in (8, 16)
    assert second.steps[0].at_once == first.at_once
    assert first.prompt_tokens > 24 * 50
    assert [(one.items, one.different) for one in noise] == [(CODES, noise[0].different)]


def in_terminal(command: list[str]) -> tuple[int, str, str]:
    """Exit status, what a terminal shows, and stdout of a command."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "150"}
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                return
            if not data:
                return
            shown.extend(data)

    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    out, _ = run.communicate(timeout=300)
    reader.join()
    os.close(ours)
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode(errors="replace"))
    return run.returncode, plain, out.decode()


def test_the_command_shows_a_bar_with_the_time_left_and_writes_the_outcome(
    pages, server, tiny, tmp_path
):
    command = [sys.executable, "-m", "accuracy", str(tiny), "--reference", str(tiny)]
    command += ["--suite", "report", "--tasks", "ocrbench,longvideobench", "--own-data"]
    command += ["--data", str(pages), "--out", str(tmp_path), "--max-loss", "90"]
    command += ["--endpoint", server.url, "--reference-endpoint", server.url, "--noise-floor"]
    status, shown, out = in_terminal(command)
    assert status == 0, shown
    lowest = re.search(r"no interval begins below ([+-][\d.]+) points \((.*)\), -90 allowed", out)
    assert float(lowest[1]) >= -90
    assert lowest[2] in ("ocrbench", "longvideobench")
    assert "asked twice" in out
    assert re.search(r"ocrbench.*\d+/\d+ .*at once, .*gone, .*0:00:\d\d.* left", shown)
    outcome = json.loads((tmp_path / "report.json").read_text())
    assert outcome["passed"] is True
    assert [one["task"] for one in outcome["asked"]] == ["ocrbench", "longvideobench"] * 2
    assert all(one["seconds"] > 0 and one["failed"] == 0 for one in outcome["asked"])
