"""Writes small data in the formats of the benchmarks: the tables and folders that VLMEvalKit reads.

    python tests/accuracy/suite_data.py FOLDER           # a few items of each
    python tests/accuracy/suite_data.py FOLDER 160       # an OCRBench of so many pages with a code

Pictures, a clip and questions are drawn here; nothing is taken from the benchmarks.
"""

import base64
import csv
import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

CHART_ANSWERS = ["100", "40", "red", "2011", "7", "blue"]
SNAPSHOT = "0" * 40


def picture(text: str) -> str:
    """A PNG with a text, in base64."""
    image = Image.new("RGB", (160, 80), "white")
    ImageDraw.Draw(image).text((20, 30), text, fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_chartqa(folder: Path, answers: list[str]) -> None:
    rows = []
    for number, answer in enumerate(answers):
        question = f"What is bar {number}?"
        rows.append(
            {"index": number, "image": picture(answer), "question": question, "answer": answer}
        )
    write_table(folder / "ChartQA_TEST.tsv", rows)


def write_docvqa(folder: Path, answers: list[list[str]], name: str = "DocVQA_VAL") -> None:
    """InfoVQA's table has the same columns."""
    rows = []
    for number, accepted in enumerate(answers):
        question = f"Which name stands in line {number}?"
        rows.append(
            {
                "index": number,
                "image": picture(accepted[0]),
                "question": question,
                "answer": str(accepted),
            }
        )
    write_table(folder / f"{name}.tsv", rows)


def write_textvqa(folder: Path, answers: list[list[str]]) -> None:
    rows = []
    for number, accepted in enumerate(answers):
        rows.append(
            {
                "index": number,
                "image": picture(accepted[0]),
                "question": f"What is written on sign {number}?",
                "answer": str(accepted),
            }
        )
    write_table(folder / "TextVQA_VAL.tsv", rows)


def write_mmmu(folder: Path, letters: list[str]) -> None:
    rows = []
    for number, letter in enumerate(letters):
        rows.append(
            {
                "index": number,
                "image": picture(f"figure {number}"),
                "question": f"Which shape does <image 1> show, in row {number}?",
                "A": "circle",
                "B": "square",
                "C": "triangle",
                "D": "star",
                "answer": letter,
                "category": "Geometry",
                "l2-category": "Science",
                "split": "dev" if number == 0 else "validation",
            }
        )
    write_table(folder / "MMMU_DEV_VAL.tsv", rows)


def write_ai2d(folder: Path, letters: list[str]) -> None:
    rows = []
    for number, letter in enumerate(letters):
        rows.append(
            {
                "index": number,
                "image": picture(f"diagram {number}"),
                "question": f"Which part does arrow {number} point to?",
                "A": "root",
                "B": "stem",
                "C": "leaf",
                "D": "flower",
                "answer": letter,
                "category": "plants",
                "image_path": f"{number}.png",
            }
        )
    write_table(folder / "AI2D_TEST.tsv", rows)


def write_ocrbench(folder: Path, answers: list[list[str]]) -> None:
    rows = []
    for number, accepted in enumerate(answers):
        rows.append(
            {
                "index": number,
                "image": picture(accepted[0]),
                "question": "What is written in the image?",
                "answer": str(accepted),
                "category": "Regular Text Recognition",
            }
        )
    write_table(folder / "OCRBench.tsv", rows)


def write_ocrbench_pictures(folder: Path, pictures: list[tuple[str, str, str]]) -> None:
    """Pictures that were drawn elsewhere: each in base64, with question and answer."""
    rows = []
    for number, (encoded, question, answer) in enumerate(pictures):
        rows.append(
            {
                "index": number,
                "image": encoded,
                "question": question,
                "answer": str([answer]),
                "category": "Regular Text Recognition",
            }
        )
    write_table(folder / "OCRBench.tsv", rows)


def write_codes(folder: Path, count: int) -> None:
    """An OCRBench of pages with a code, which the tiny checkpoint was trained to read."""
    from tiny.tasks import items

    rows = []
    for sample in items("document", count=count):
        page, question = sample.messages[-1]["content"]
        encoded = page["image_url"]["url"].partition(",")[2]
        rows.append((encoded, question["text"], sample.answer))
    write_ocrbench_pictures(folder, rows)


def write_ocrbench_v2(folder: Path, entries: list[tuple[str, list[str]]]) -> None:
    """Entries are category and accepted answers."""
    rows = []
    for number, (category, accepted) in enumerate(entries):
        rows.append(
            {
                "index": number,
                "image": picture(accepted[0]),
                "question": f"What does part {number} say?",
                "answer": str(accepted),
                "category": category,
                "eval": "without eval",
                "bbox": "without bbox",
                "content": "without content",
            }
        )
    write_table(folder / "OCRBench_v2.tsv", rows)


def write_mathvista(folder: Path, answers: list[int]) -> None:
    rows = []
    for number, answer in enumerate(answers):
        rows.append(
            {
                "index": number,
                "image": picture(f"{answer} dots"),
                "question": f"How many dots has picture {number}?",
                "question_type": "free_form",
                "answer_type": "integer",
                "answer": answer,
                "answer_option": "",
                "choices": "[]",
                "task": "figure question answering",
                "skills": "['arithmetic']",
            }
        )
    write_table(folder / "MathVista_MINI.tsv", rows)


def write_ocr_reasoning(folder: Path, entries: list[tuple[str, str]]) -> None:
    """Entries are answer type and answer; of `option`, the letter of a choice."""
    rows = []
    for number, (kind, answer) in enumerate(entries):
        is_choice = kind == "option"
        rows.append(
            {
                "index": number,
                "image": picture(f"bill {number}"),
                "question": f"What does bill {number} add up to?",
                "question_type": "multi_choice" if is_choice else "free_form",
                "answer_type": "text" if is_choice else kind,
                "answer": "" if is_choice else answer,
                "answer_option": answer if is_choice else "",
                "choices": str(["ten", "eleven", "twelve"]) if is_choice else "[]",
                "task": "Numerical Analysis Reasoning",
                "reasoning": "Add the prices of all lines.",
                "language": "English",
                "format": "The answer is: number",
            }
        )
    write_table(folder / "OCR_Reasoning.tsv", rows)


def hub_snapshot(folder: Path, dataset: str) -> Path:
    """A snapshot of a dataset in a cache of the Hub."""
    root = folder / "hub" / f"datasets--{dataset}"
    snapshot = root / "snapshots" / SNAPSHOT
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs/main").write_text(SNAPSHOT)
    (root / "blobs").mkdir(exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def write_videomme(folder: Path, letters: list[str], clip: bytes) -> None:
    snapshot = hub_snapshot(folder, "lmms-lab--Video-MME")
    (snapshot / "video").mkdir(exist_ok=True)
    (snapshot / "video/first.mp4").write_bytes(clip)
    rows = []
    for number, letter in enumerate(letters):
        rows.append(
            {
                "index": number,
                "video": "first",
                "video_path": "./video/first.mp4",
                "duration": "short",
                "domain": "Knowledge",
                "candidates": str(["A. red", "B. green", "C. blue", "D. white"]),
                "sub_category": "Humanity & History",
                "task_type": "Object Recognition",
                "subtitle_path": "./subtitle/first.srt",
                "question": f"Which colour comes at place {number}?",
                "answer": letter,
            }
        )
    write_table(snapshot / "Video-MME.tsv", rows)


def write_longvideobench(folder: Path, choices: list[int], clip: bytes) -> None:
    snapshot = hub_snapshot(folder, "longvideobench--LongVideoBench")
    (snapshot / "videos").mkdir(exist_ok=True)
    (snapshot / "videos/first.mp4").write_bytes(clip)
    rows = []
    for number, choice in enumerate(choices):
        rows.append(
            {
                "index": number,
                "video": "first",
                "video_path": "./videos/first.mp4",
                "question": f"What happens at {number} s?",
                "candidates": str(["rain", "snow", "sun", "wind"]),
                "correct_choice": choice,
                "duration": 12.0,
                "duration_group": 15,
                "question_category": "S2E",
                "subtitle_path": "first.json",
                "starting_timestamp_for_subtitles": 0,
            }
        )
    write_table(snapshot / "LongVideoBench.tsv", rows)


def write_clip(path: Path) -> bytes:
    """A clip of two seconds: three colours."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(8):
            pixels = np.zeros((128, 128, 3), np.uint8)
            pixels[..., number % 3] = 200
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path.read_bytes()


def write_text_task(folder: Path, answers: list[str]) -> None:
    """A task file of lm-eval with its data, shaped like GSM8K."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sums.jsonl").open("w", encoding="utf-8") as file:
        for number, answer in enumerate(answers):
            line = {"question": f"What is {number} plus one?", "answer": f"#### {answer}"}
            file.write(json.dumps(line) + "\n")
    (folder / "sums.yaml").write_text(
        f"""\
task: small_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "sums.jsonl"}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: ["(?s).*#### "]
generation_kwargs:
  until: ["Question:"]
  max_gen_toks: 16
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### (-?[0-9]+)"}}
      - {{function: take_first}}
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""
    )


def write_all(folder: Path) -> None:
    """Everything, with answers by which scores are worked out by hand in the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = write_clip(folder / "clip.mp4")
    write_chartqa(folder, ["100", "40", "red", "2011"])
    write_docvqa(folder, [["Anna Smith"], ["Bern", "Berne"], ["42"], ["July"]])
    write_textvqa(folder, [["stop"] * 10, ["exit"] * 2 + ["way out"] * 8])
    write_mmmu(folder, ["A", "A", "B", "C"])
    write_ocrbench(folder, [["HELLO"], ["open"], ["17"], ["sale", "SALE!"]])
    entries = [("text recognition en", ["north"])] * 2 + [("cognition VQA en", ["seven"])]
    write_ocrbench_v2(folder, [*entries, ("reasoning VQA cn", ["七"])])
    write_mathvista(folder, [5, 6])
    write_docvqa(folder, [["1,200"], ["north", "North"], ["July 2019"]], name="InfoVQA_VAL")
    write_ai2d(folder, ["A", "B", "C", "D"])
    entries = [("integer", "12"), ("float", "2.5"), ("string", "7:30"), ("option", "C")]
    write_ocr_reasoning(folder, [*entries, ("integer", "0")])
    write_videomme(folder, ["A", "B", "C", "D"], clip)
    write_longvideobench(folder, [0, 1, 2, 3], clip)
    write_text_task(folder / "tasks", ["1", "2", "3", "4"])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        write_codes(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        write_all(Path(sys.argv[1]))
