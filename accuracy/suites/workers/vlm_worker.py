"""Builds the prompts and scores the answers of one image or video suite with VLMEvalKit's classes.

    .venv-eval/bin/python vlm_worker.py

Runs in the harnesses' environment (`make setup-eval`); see worker_protocol.py for the protocol.
Only VLMEvalKit's classes decide what is asked and what is right; this file carries.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import tempfile
import types
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pandas as pd
from worker_protocol import DataError, serve_requests

CLASSES = {
    "MMMU_DEV_VAL": ("image_mcq", "MMMUDataset"),
    "AI2D_TEST": ("image_mcq", "ImageMCQDataset"),
    "MathVista_MINI": ("image_vqa", "MathVista"),
    "OCRBench": ("image_vqa", "OCRBench"),
    "OCRBench_v2": ("image_vqa", "OCRBench_v2"),
    "OCR_Reasoning": ("image_vqa", "OCR_Reasoning"),
    "ChartQA_TEST": ("image_vqa", "ImageVQADataset"),
    "DocVQA_VAL": ("image_vqa", "ImageVQADataset"),
    "InfoVQA_VAL": ("image_vqa", "ImageVQADataset"),
    "TextVQA_VAL": ("image_vqa", "ImageVQADataset"),
    "Video-MME": ("videomme", "VideoMME"),
    "LongVideoBench": ("longvideobench", "LongVideoBench"),
}
"""Module below vlmeval.dataset and class of each data set."""

VIDEO_REPOSITORIES = {
    "Video-MME": "lmms-lab/Video-MME",
    "LongVideoBench": "longvideobench/LongVideoBench",
}
"""Where VLMEvalKit takes the clips from: data sets of the Hub, in its cache."""

JUDGED = {"MathVista_MINI": "mathvista", "OCR_Reasoning": "ocr_reasoning"}
"""Data sets whose answers a judge model reads, and the module with their rules."""

_FAILED_JUDGE = "All 5 retries failed"

_GIGABYTE = 2**30


def _bare_package(name: str, folder: Path) -> types.ModuleType:
    """A package whose modules can be imported without its `__init__` being run."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package


def _prepare_harness() -> None:
    """Make VLMEvalKit's modules importable one by one.

    The `__init__` of vlmeval and of vlmeval.dataset import 140 data sets and 200 models, which
    need torch, OpenCV and a dozen distributions that nothing here uses: `import vlmeval` ends with
    "No module named 'torchvision'".
    """
    root = Path(str(distribution("ms-vlmeval").locate_file("vlmeval")))
    vlmeval = _bare_package("vlmeval", root)
    vlmeval.dataset = _bare_package("vlmeval.dataset", root / "dataset")  # type: ignore[attr-defined]
    api = _bare_package("vlmeval.api", root / "api")
    # build_judge takes these three from the package and uses the first.
    api.OpenAIWrapper = importlib.import_module("vlmeval.api.gpt").OpenAIWrapper  # type: ignore[attr-defined]
    api.HFChatModel = None  # type: ignore[attr-defined]
    api.SiliconFlowAPI = None  # type: ignore[attr-defined]
    # Files above 1 GB are unpacked by a function of vlmeval.tools, whose imports need torch.
    tools = types.ModuleType("vlmeval.tools")
    sys.modules["vlmeval.tools"] = tools
    tools.LOCALIZE = _unpack_pictures  # type: ignore[attr-defined]
    # Intermediate tables as TSV: its default, xlsx, needs two more distributions.
    os.environ["PRED_FORMAT"] = "tsv"
    # This distribution looks for data at another hub unless it is told not to.
    os.environ["VLMEVALKIT_USE_MODELSCOPE"] = "0"


def _unpack_pictures(table: str, unpacked: str) -> None:
    """What `vlmeval.tools.LOCALIZE` does, with the same two functions."""
    files = importlib.import_module("vlmeval.smp.file")
    name = Path(table).stem
    files.dump(files.localize_df(files.load(table), name), unpacked)


def _check_wordnet(categories: set[str]) -> None:
    """Say before anything is asked what the METEOR score of these categories needs."""
    if not categories & {"fine-grained text recognition en", "full-page OCR en"}:
        return
    nltk = importlib.import_module("nltk")
    for place in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(place)
        except LookupError:
            continue
        return
    raise DataError(
        "OCRBench v2: its METEOR score needs nltk's wordnet "
        f"({sys.executable} -m nltk.downloader wordnet)"
    )


def _rated_or_unscored(model: Any, line: Any) -> dict[str, Any]:
    """Ask the judge about one answer of OCR-Reasoning as VLMEvalKit does.

    Where the judge gives no rating six times, VLMEvalKit ends with an AttributeError; here that
    answer alone is left out. A function of this module, because processes are sent its name.
    """
    rules = importlib.import_module("vlmeval.dataset.utils.ocr_reasoning")
    try:
        return dict(rules.unguarded(model, line))
    except AttributeError:
        return {"log": _FAILED_JUDGE, "res": "", "reason_score": 0.0}


def _guard_ratings() -> None:
    rules: Any = importlib.import_module("vlmeval.dataset.utils.ocr_reasoning")
    if rules.OcrR_auxeval is not _rated_or_unscored:
        rules.unguarded = rules.OcrR_auxeval
        rules.OcrR_auxeval = _rated_or_unscored


class Suite:
    """One data set that is open."""

    def __init__(self) -> None:
        self.name = ""
        self.dataset: Any = None
        self.rows: dict[str, pd.Series] = {}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the data and return the items.

        The request names `dataset`, the folder `data`, and `is_own_data`: whether data with
        another checksum than the published is taken.
        """
        self.name = request["dataset"]
        folder = Path(request["data"])
        os.environ["LMUData"] = str(folder)  # noqa: SIM112
        if (folder / "hub").is_dir():
            os.environ["HF_HUB_CACHE"] = str(folder / "hub")
        module, class_name = CLASSES[self.name]
        dataset_class = getattr(importlib.import_module(f"vlmeval.dataset.{module}"), class_name)
        is_own = bool(request["is_own_data"])
        if self.name in VIDEO_REPOSITORIES:
            self.dataset = self._open_video(dataset_class, is_own)
        else:
            self.dataset = self._open_images(dataset_class, folder, is_own)
        table = self.dataset.data
        if self.name == "OCRBench_v2":
            _check_wordnet(set(table["category"]))
        self.rows = {}
        items = []
        for position in range(len(table)):
            row = table.iloc[position]
            if self._is_asked(row):
                name = str(row["index"])
                self.rows[name] = row
                items.append({"id": name, "group": self._group(row)})
        root = getattr(self.dataset, "data_root", None)
        file = getattr(self.dataset, "data_file", None) or self.dataset.data_path
        return {
            "items": items,
            "media_root": None if root is None else str(Path(root).resolve()),
            "data": importlib.import_module("vlmeval.smp").md5(str(file)),
        }

    def _open_images(self, dataset_class: Any, folder: Path, is_own: bool) -> Any:
        table = folder / f"{self.name}.tsv"
        published = dataset_class.DATASET_MD5[self.name]
        md5 = importlib.import_module("vlmeval.smp").md5
        if table.exists():
            if is_own:
                known = {name: value for name, value in dataset_class.DATASET_MD5.items()}
                known[self.name] = md5(str(table))
                dataset_class.DATASET_MD5 = known
            elif md5(str(table)) != published:
                raise DataError(
                    f"{table}: is not the published file: its MD5 is not {published} "
                    "(remove it to have it downloaded, or give --own-data)"
                )
            return dataset_class(dataset=self.name)
        url = dataset_class.DATASET_URL[self.name]
        if is_own:
            raise DataError(f"{table}: no such file (put your data there)")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            dataset = dataset_class(dataset=self.name)
        except Exception as error:
            table.unlink(missing_ok=True)
            raise DataError(f"{table}: {error} (download {url} and put it there)") from None
        # VLMEvalKit checks a file that is there, not one that it has downloaded, and downloads
        # without checking the server's certificate.
        if md5(str(table)) != published:
            table.unlink()
            raise DataError(f"{url}: the download has another MD5 than {published} (try again)")
        return dataset

    def _open_video(self, dataset_class: Any, is_own: bool) -> Any:
        smp = importlib.import_module("vlmeval.smp")
        repository = VIDEO_REPOSITORIES[self.name]
        snapshot = smp.get_cache_path(repository)
        if snapshot is None:
            # Otherwise VLMEvalKit downloads a hundred gigabytes unasked.
            raise DataError(
                f"{repository}: is not in the Hub's cache "
                f"(hf download {repository} --repo-type dataset)"
            )
        table = Path(snapshot) / f"{self.name}.tsv"
        if is_own:
            if not table.exists():
                raise DataError(f"{table}: no such file (put your data there)")
            dataset_class.MD5 = smp.md5(str(table))
        try:
            dataset = dataset_class(dataset=self.name, use_subtitle=False, nframe=1)
        except Exception as error:
            if is_own:
                raise
            # What is not whole in the cache is looked for on the Hub, and its message is long.
            raise DataError(
                f"{repository}: its copy in the Hub's cache is not whole: {type(error).__name__} "
                f"(hf download {repository} --repo-type dataset)"
            ) from None
        if not is_own and smp.md5(dataset.data_file) != dataset_class.MD5:
            raise DataError(f"{table}: is not the published table (remove it: it is made again)")
        return dataset

    def _is_asked(self, row: pd.Series) -> bool:
        """Whether the published figure counts an item."""
        if self.name == "MMMU_DEV_VAL":
            return bool(row["split"] == "validation")
        if self.name == "OCRBench_v2":
            return str(row["category"]).endswith(" en")
        return True

    def _group(self, row: pd.Series) -> str:
        """What the data set averages over first; empty where it averages over items."""
        if self.name != "OCRBench_v2":
            return ""
        rules = importlib.import_module("vlmeval.dataset.utils.ocrbrnch_v2_eval")
        groups, _ = rules.ocrbench_v2_aggregate_accuracy([{"type": row["category"], "score": 0}])
        return str(next(iter(groups)))

    def prompt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return an item's prompt: OpenAI messages with files in place of URLs."""
        row = self.rows[request["item"]].copy()  # LongVideoBench changes the row
        if self.name in VIDEO_REPOSITORIES:
            parts = self.dataset.build_prompt(row, video_llm=True)
        else:
            parts = self.dataset.build_prompt(row)
        content = []
        for part in parts:
            if part["type"] == "text":
                if part["value"]:  # Video-MME begins with an empty one
                    content.append({"type": "text", "text": part["value"]})
            else:
                path = str(Path(part["value"]).resolve())
                content.append({"type": part["type"], "path": path})
        return {"messages": [{"role": "user", "content": content}]}

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Score answers by item.

        Returns:
            `scores` between 0 and 1 by item; `overall`, the data set's own figure over these
            items in percent; `unscored`: items that the judge failed to read.
        """
        answers = request["answers"]
        table = pd.DataFrame([self.rows[item] for item in answers])
        table = table.drop(columns=["image"], errors="ignore").reset_index(drop=True)
        table["prediction"] = [str(answer) for answer in answers.values()]
        items = list(answers)
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            # Text spotting writes below the current directory.
            os.chdir(folder)
            try:
                scores, overall, unscored = self._scores(table, items, folder, request["judge"])
            finally:
                os.chdir(before)
        return {"scores": scores, "overall": overall, "unscored": unscored}

    def _scores(
        self, table: pd.DataFrame, items: list[str], folder: str, judge: Mapping[str, Any] | None
    ) -> tuple[dict[str, float], float, list[str]]:
        if self.name in VIDEO_REPOSITORIES:
            values, overall = self._video_scores(table, folder)
        elif self.name in JUDGED:
            return self._judged_scores(table, items, folder, judge)
        elif self.name == "OCRBench":
            values, overall = self._ocrbench_scores(table, folder)
        elif self.name == "OCRBench_v2":
            values, overall = self._ocrbench_v2_scores(table, folder)
        elif CLASSES[self.name][0] == "image_mcq":
            values, overall = self._choice_scores(table, folder)
        else:
            values, overall = self._vqa_scores(table, folder)
        scores = {item: float(value) for item, value in zip(items, values, strict=True)}
        return scores, overall, []

    def _video_scores(self, table: pd.DataFrame, folder: str) -> tuple[list[float], float]:
        # LongVideoBench's evaluate takes an item's number for its row: a sample would be scored
        # in rows that it does not have.
        table = table.assign(index=range(len(table)))
        file = os.path.join(folder, "answers.tsv")
        smp = importlib.import_module("vlmeval.smp")
        smp.dump(table, file)
        rating = self.dataset.evaluate(file, model="exact_matching")
        scored = smp.load(os.path.join(folder, "answers_score.tsv"))
        return list(scored["score"]), 100 * float(rating["overall"]["overall"])

    def _choice_scores(self, table: pd.DataFrame, folder: str) -> tuple[list[float], float]:
        file = self._write(table, folder)
        report = self.dataset.evaluate(file, model="exact_matching")
        results = pd.read_pickle(os.path.join(folder, "answers_exact_matching_result.pkl"))
        return [results[index]["hit"] for index in table["index"]], 100 * float(
            report["Overall"].iloc[0]
        )

    def _vqa_scores(self, table: pd.DataFrame, folder: str) -> tuple[list[float], float]:
        # evaluate keeps the matches of each item, not the item's score: what it takes the mean of
        # is what this function of its own returns first.
        rules: Any = importlib.import_module("vlmeval.dataset.utils.vqa_eval")
        results: list[list[float]] = []
        calculate = rules.hit_calculate

        def recorded(*arguments: Any, **options: Any) -> list[float]:
            results.append(calculate(*arguments, **options))
            return results[-1]

        rules.hit_calculate = recorded
        try:
            report = self.dataset.evaluate(self._write(table, folder))
        finally:
            rules.hit_calculate = calculate
        values = next(found for found in results if len(found) == len(table))
        return values, float(report["Overall"].iloc[0])

    def _ocrbench_scores(self, table: pd.DataFrame, folder: str) -> tuple[list[float], float]:
        values = []
        for position in range(len(table)):
            one = self._write(table.iloc[position : position + 1], folder)
            values.append(float(self.dataset.evaluate(one)["Final Score"]))
        final = self.dataset.evaluate(self._write(table, folder))["Final Score"]
        return values, 100 * final / len(table)

    def _ocrbench_v2_scores(self, table: pd.DataFrame, folder: str) -> tuple[list[float], float]:
        rules = importlib.import_module("vlmeval.dataset.utils.ocrbrnch_v2_eval")
        scored, overall = self._recorded_v2(rules, table, folder)
        return [float(item["score"]) for item in scored], 100 * overall

    def _recorded_v2(
        self, rules: Any, table: pd.DataFrame, folder: str
    ) -> tuple[list[dict[str, Any]], float]:
        """The scored items, which evaluate does not return, and the English overall score.

        evaluate divides by the number of Chinese groups, which are not asked: the English mean is
        formed here as there.
        """
        scored: list[dict[str, Any]] = []
        process = rules.process_predictions

        def recorded(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
            scored.extend(process(entries))
            return scored

        rules.process_predictions = recorded
        try:
            self.dataset.evaluate(self._write(table, folder))
        except ZeroDivisionError:
            pass
        finally:
            rules.process_predictions = process
        groups, _ = rules.ocrbench_v2_aggregate_accuracy(scored)
        return scored, sum(groups.values()) / len(groups)

    def _judged_scores(
        self, table: pd.DataFrame, items: list[str], folder: str, judge: Mapping[str, Any] | None
    ) -> tuple[dict[str, float], float, list[str]]:
        rules = importlib.import_module(f"vlmeval.dataset.utils.{JUDGED[self.name]}")
        if judge is None:
            # Not comparable: what VLMEvalKit can read without a judge is right or wrong, the rest
            # is wrong.
            read = [rules.post_check(row, prefetch=True) for _, row in table.iterrows()]
            # False stands for what cannot be read; the number 0 is an answer.
            table["res"] = ["" if found is False else found for found in read]
            table["log"] = ""
        else:
            file = self._write(table, folder)
            files = importlib.import_module("vlmeval.smp.file")
            kept = files.get_intermediate_file_path(file, f"_{judge['model']}", "pkl")
            Path(kept).parent.mkdir(exist_ok=True)  # the name of a model may contain a slash
            _guard_ratings()
            self.dataset.evaluate(
                file, model=judge["model"], api_base=judge["url"], key=judge["key"]
            )
            read_by_judge = pd.read_pickle(kept)
            table["res"] = [read_by_judge[index]["res"] for index in table["index"]]
            table["log"] = [read_by_judge[index]["log"] for index in table["index"]]
        scores = {}
        unscored = []
        for item, (_, row) in zip(items, table.iterrows(), strict=True):
            if _FAILED_JUDGE in row["log"]:
                unscored.append(item)
            else:
                scores[item] = float(bool(rules.post_check(row, prefetch=False)))
        overall = 100 * sum(scores.values()) / len(scores) if scores else math.nan
        return scores, overall, unscored

    def _write(self, table: pd.DataFrame, folder: str) -> str:
        """The answers as a pickle: a table of text would turn the answer 007 into 7."""
        for old in Path(folder).glob("answers*"):
            old.unlink()
        file = os.path.join(folder, "answers.pkl")
        table.to_pickle(file)
        return file


if __name__ == "__main__":
    _prepare_harness()
    suite = Suite()
    serve_requests({"open": suite.open, "prompt": suite.prompt, "score": suite.score})
