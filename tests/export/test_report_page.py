"""The report as a headless Chromium shows it: what is visible, keyboard, colours, paper.

With HYBRIDQUANT_SCREENSHOT=FILE the screenshot is written there as well; README shows it:

    HYBRIDQUANT_SCREENSHOT=docs/images/report.png python -m pytest tests/export/test_report_page.py
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from checkpoint.atomic import write_json
from checkpoint.faults import BadInput, Fault
from checkpoint.layout import language_model_linears
from export.layout import quantized_layout
from export.publish.charts import stack_chart, whiskers
from export.publish.errors import weight_errors
from export.publish.facts import read_facts
from export.publish.measured import Sweep, read_bench, read_sweep
from export.publish.model_card import Verdict
from export.publish.recorded import Task
from export.publish.report import _run, report_text
from export.publish.suites import read_accuracy
from export.write import quantization_config
from quantize.policy import Rule, make_policy
from tests.editing import edit_json
from tests.export.chromium import running_chromium
from tests.export.suite_outcome import write_outcome

MANIFEST = "hybridquant.json"
SOUND = Verdict((), compared=True)
RECORDED_SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "evs_sweep_cpu.json"
BENCH_FILE = {
    "device": "one GPU",
    "workload": "video",
    "measured": [
        {
            "server": "ours",
            "concurrency": 12,
            "requests_per_s": 1.34,
            "output_tokens_per_s": 4304,
            "ttft_ms_median": 1200.0,
        }
    ],
}
POINT = {"directory": "a", "rate": 0.5, "accuracy": 0.5, "loss_low": 0, "loss_high": 0}
HOSTILE = '</title><img src=x onerror="window.hit=1"><script>window.hit=1</script>{{ 7*7 }}'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with running_chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def shown(browser, tmp_path):
    """A function that opens a page's text and returns the tab; nothing but the file is loaded."""
    tabs = []

    def show(text: str, **options):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        tab = browser.new_page(**{"viewport": {"width": 1120, "height": 800}, **options})
        tabs.append(tab)
        loaded, said = [], []
        tab.on("request", lambda request: loaded.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri())
        assert [url for url in loaded if not url.startswith("data:")] == [path.as_uri()]
        assert said == []
        return tab

    yield show
    for tab in tabs:
        tab.close()


@pytest.fixture(scope="module")
def page_of_fp8(fp8, tiny) -> str:
    facts = read_facts(fp8, weight_errors(fp8, tiny))
    return report_text(facts, SOUND)


def sparse_export(folder: Path, config, tasks: list[dict]) -> Path:
    """A directory of the 12B's layout in NVFP4 and FP8 whose weights are a hole in one file."""
    rules = [
        Rule(format="nvfp4"),
        Rule(format="fp8", kind="attention"),
        Rule(format="bf16", layers=(0,)),
    ]
    policy = make_policy(rules, language_model_linears(config))
    header = {}
    end = 0
    for name, spec in quantized_layout(config, policy.quantized, kv_scales=False).items():
        offsets = [end, end + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        end += spec.nbytes
    written = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    section = {**quantization_config(policy)["quantization"], "quant_method": "modelopt"}
    section["ignore"] = section.pop("exclude_modules")
    write_json(folder / "config.json", {**config.raw, "quantization_config": section})
    figures = {"prompts": 9, "tokens": 999, "kl": 0.01, "top1": 0.97, "perplexity_ratio": 1.01}
    groups = dict.fromkeys(["all", "document", "chart", "video", "text"], figures)
    gate = {"passed": True, "missed": [], "agreement": groups, "tasks": tasks}
    write_json(folder / MANIFEST, {"gate": gate, "calibration": {"samples": 1024}})
    return folder


@pytest.fixture(scope="module")
def page_of_12b(full12b, tmp_path_factory) -> str:
    rows = []
    for name in [*(f"benchmark {number}" for number in range(12)), "mean"]:
        row = {"task": name, "items": 1000, "reference": 0.8, "variant": 0.79}
        rows.append({**row, "low": -0.02, "high": 0.004})
    folder = sparse_export(tmp_path_factory.mktemp("12b"), full12b, rows)
    write_json(folder / "bench", BENCH_FILE)
    sweep, bench = read_sweep(RECORDED_SWEEP, "12b"), read_bench(folder / "bench")
    (folder / "bench").unlink()
    return report_text(read_facts(folder), SOUND, sweep, bench)


def test_what_a_reader_sees(shown, page_of_fp8, fp8):
    tab = shown(page_of_fp8)
    assert tab.get_by_role("heading", level=1).inner_text() == fp8.name
    tiles = tab.locator(".tiles li").all_inner_texts()
    assert [" ".join(tile.split()) for tile in tiles] == [
        "weights 6.2 MB 7.3 MB in BF16",
        "accuracy 100.0 % 100.0 % in BF16",
        tiles[2].replace("\n", " "),
        "gate passed of the recipe",
        "verifier no faults compared with the source",
    ]
    for heading in ("Warnings", "The hybrid stack", "Accuracy against BF16", "How to serve"):
        assert tab.get_by_role("heading", name=heading).is_visible()
    document = tab.locator("tr", has_text="document").inner_text().split("\t")
    assert document[:6] == ["document", "8", "100.0 %", "100.0 %", "+0.0", "+0.0 … +0.0"]
    assert tab.get_by_text("Calibrated on 7 samples").is_visible()
    off = f"hybridquant serve {fp8.name} --video-pruning-rate 0"
    assert tab.get_by_text(off).is_visible()
    assert not tab.get_by_role("heading", name="Efficient Video Sampling").is_visible()
    assert not tab.get_by_role("heading", name="Throughput").is_visible()
    assert not tab.get_by_role("table").nth(0).get_by_text("layer", exact=True).is_visible()


def test_published_benchmarks_are_shown_with_gate_curve_and_published_figures(
    shown, fp8, tiny, tmp_path
):
    outcome = write_outcome(tmp_path / "report.json", fp8, tiny)
    _, benchmarks = read_accuracy([outcome], fp8)
    tab = shown(report_text(read_facts(fp8, benchmarks=benchmarks), SOUND))
    section = tab.get_by_role("region", name="Published benchmarks: report")
    assert section.is_visible()
    chartqa = section.locator("tr", has_text="chartqa").inner_text().split("\t")
    assert chartqa[:5] == ["chartqa", "997", "90.0 %", "89.8 %", "-0.2"]
    assert chartqa[7:] == [
        "passed",
        "BF16 89.68, FP8 PTQ 89.44, NVFP4 PTQ 88.84, NVFP4 QAD 89.96",
    ]
    assert section.locator("td.bad").inner_text() == "failed"
    notes = section.get_by_role("listitem").all_inner_texts()
    assert "mathvista: 5.0 points lost, 1.5 allowed." in notes
    assert "chartqa: 3 requests failed; they count neither right nor wrong." in notes
    curve = section.get_by_role("img", name="video_mme against the EVS rate")
    assert curve.is_visible()
    assert curve.locator("circle").count() == 3
    assert curve.locator("polyline.published").count() == 2
    assert section.get_by_text("dashed: published, BF16 and FP8 PTQ").is_visible()
    warning = "Not every published benchmark passed its gate: mathvista (failed)."
    assert tab.get_by_text(warning).is_visible()
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 1120


def test_the_screenshot(shown, page_of_fp8, tmp_path):
    size = {"width": 1120, "height": 980}
    tab = shown(page_of_fp8, viewport=size, device_scale_factor=1.25)
    path = tmp_path / "report.png"
    tab.screenshot(path=path)
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.size == (1400, 1225)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 100
    if os.environ.get("HYBRIDQUANT_SCREENSHOT"):
        shutil.copy(path, os.environ["HYBRIDQUANT_SCREENSHOT"])


def test_every_layer_is_a_column_with_a_name(shown, page_of_12b):
    tab = shown(page_of_12b)
    columns = tab.locator("svg.stack a")
    assert columns.count() == 62
    names = [column.get_attribute("aria-label") for column in columns.all()]
    assert names[0] == "layer 0: mamba, BF16, not quantized, 337.0 MB for 337.0 MB"
    assert re.match(r"layer 7: attention, FP8, error 2\.\d %, ", names[7])
    assert re.match(r"layer 1: mlp, NVFP4, error 9\.\d %, ", names[1])
    letters = tab.locator("svg.stack text[class^=kind]").all_text_contents()
    assert "".join(letters).replace("–", "-")[:10] == "M-M-M-M*-M"
    boxes = [frame.bounding_box() for frame in columns.locator(".frame").all()]
    assert len({round(box["x"]) for box in boxes}) == 62
    assert max(box["x"] + box["width"] for box in boxes) <= 1120


def test_colour_and_height_follow_the_error(shown, page_of_12b):
    tab = shown(page_of_12b)

    def bar(layer):
        return tab.locator("svg.stack a").nth(layer).locator("rect").first

    fills = {layer: bar(layer).evaluate("e => getComputedStyle(e).fill") for layer in (0, 1, 7)}
    assert len(set(fills.values())) == 3
    heights = [bar(layer).bounding_box()["height"] for layer in (0, 7, 1)]
    assert heights == sorted(heights)


def test_sweep_and_throughput_are_shown_where_they_were_measured(shown, page_of_12b):
    tab = shown(page_of_12b)
    assert tab.get_by_role("img", name="accuracy against the EVS rate").is_visible()
    assert tab.get_by_role("img", name="seconds to the first token against").is_visible()
    assert tab.get_by_role("row", name="0.75 84.5 %").is_visible()
    assert tab.get_by_role("row", name="ours, video, 12 at once 1.34 4304 1.20 s").is_visible()


def test_the_keyboard_reaches_everything(shown, page_of_fp8):
    tab = shown(page_of_fp8)
    tab.keyboard.press("Tab")
    skip = tab.get_by_role("link", name="Skip the layers")
    assert skip.evaluate("e => e === document.activeElement")
    assert skip.bounding_box()["x"] >= 0
    tab.keyboard.press("Tab")
    column = tab.locator("svg.stack a").first
    assert column.evaluate("e => e === document.activeElement")
    assert column.locator(".said").is_visible()
    assert not tab.locator("svg.stack a").nth(1).locator(".said").is_visible()
    assert not tab.locator("#layer-0").is_visible()
    tab.keyboard.press("Enter")
    assert tab.locator("#layer-0").is_visible()
    assert "in_proj FP8" in tab.locator("#layer-0").inner_text()


def test_the_skip_link_leads_past_the_layers(shown, page_of_fp8):
    tab = shown(page_of_fp8)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.tagName") == "PRE"


CONTRAST = """selector => {
    const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = text => {
        const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const of = name => document.querySelector(name);
    const text = light(getComputedStyle(of(selector)).color);
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(shown, page_of_fp8, scheme):
    tab = shown(page_of_fp8, color_scheme=scheme)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 20, 25)"}[scheme]
    for selector in ("h1", ".quiet", "summary", ".good", "th"):
        assert tab.evaluate(CONTRAST, selector) >= 4.5, selector


def test_a_narrow_screen_scrolls_down_only(shown, page_of_12b):
    tab = shown(page_of_12b, viewport={"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("page", ["page_of_fp8", "page_of_12b"])
def test_it_prints_on_two_pages(shown, request, page):
    printed = shown(request.getfixturevalue(page)).pdf(prefer_css_page_size=True)
    assert 1 <= len(re.findall(rb"/Type /Page\b", printed)) <= 2


def test_foreign_text_cannot_become_markup(shown, fp8_copy):
    def plant(raw):
        raw["recipe"]["model"] = HOSTILE
        raw["recipe"]["calibrate"]["sources"] = [{"type": "hub", "name": HOSTILE}]
        raw["recipe"]["quantize"]["algorithm"] = HOSTILE
        raw["gate"]["tasks"][0]["task"] = HOSTILE
        raw["gate"]["agreement"][HOSTILE] = raw["gate"]["agreement"]["all"]
        raw["gate"].update(passed=False, missed=[HOSTILE])
        raw["versions"]["hybridquant"] = HOSTILE
        raw["calibration"][HOSTILE] = 7

    edit_json(fp8_copy / MANIFEST, plant)
    verdict = Verdict((Fault(HOSTILE, HOSTILE),), compared=False)
    sweep = Sweep(read_sweep(RECORDED_SWEEP, "").rates, HOSTILE)
    tab = shown(report_text(read_facts(fp8_copy), verdict, sweep))
    assert tab.evaluate("window.hit") is None
    assert tab.locator("img:not([role]), script").count() == 0
    assert tab.get_by_text("{{ 7*7 }}").count() >= 7
    assert tab.get_by_text("failed", exact=True).is_visible()


def test_the_command_writes_the_page_beside_the_weights(fp8_copy, tiny, tmp_path, capfd):
    status = _run([str(fp8_copy), "--source", str(tiny), "--sweep", str(RECORDED_SWEEP)])
    assert status == 0
    text = (fp8_copy / "report.html").read_text(encoding="utf-8")
    assert "the measured error of its weights" in text
    assert 'id="evs"' in text
    edit_json(fp8_copy / MANIFEST, lambda raw: raw["gate"].update(passed=False))
    assert _run([str(fp8_copy), "--output", str(tmp_path / "page.html")]) == 1
    assert "the error that rounding to its format gives" in (tmp_path / "page.html").read_text()


def test_the_same_directory_gives_the_same_page(fp8):
    pages = {report_text(read_facts(fp8), SOUND) for _ in range(2)}
    assert len(pages) == 1


def test_a_recorded_sweep_is_read():
    sweep = read_sweep(RECORDED_SWEEP, "another")
    assert [point.rate for point in sweep.rates] == [0, 0.5, 0.75, 0.9]
    unpruned, _, default, _ = sweep.rates
    assert (unpruned.accuracy, unpruned.low, unpruned.high) == (1, 1, 1)
    assert default.accuracy == pytest.approx(0.845)
    assert (default.low, default.high) == pytest.approx((0.80, 0.89))
    assert default.prompt_tokens < unpruned.prompt_tokens
    assert unpruned.first_token_s == pytest.approx(0.205, abs=0.001)


def test_of_several_directories_the_one_of_the_name_is_shown(tmp_path):
    path = tmp_path / "sweep.json"
    write_json(path, {"measured": [POINT, POINT | {"directory": "b", "accuracy": 0.25}]})
    (point,) = read_sweep(path, "b").rates
    assert point.accuracy == 0.25
    with pytest.raises(BadInput, match="is of other directories: a, b"):
        read_sweep(path, "c")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"measured": []}, "measured: List should have at least 1 item"),
        ({"measured": [POINT | {"rate": 1.5}]}, "measured.0.rate: Input should be less than 1"),
        ({"measured": [POINT | {"accuracy": "high"}]}, "measured.0.accuracy: Input should be a"),
        ({"rates": []}, "measured: Field required"),
        ([], "the file: Input should be a valid dictionary"),
    ],
)
def test_a_file_of_another_shape_is_one_fault(tmp_path, content, said):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput) as caught:
        read_sweep(path, "a")
    assert said in caught.value.faults[0].what
    with pytest.raises(BadInput):
        read_bench(path)


def test_a_whisker_spans_its_interval():
    task = Task("a", 10, reference=0.5, variant=0.52, low=-0.02, high=0.04)
    (whisker,), limit = whiskers([task])
    assert limit == 0.04
    assert (whisker.low, whisker.middle, whisker.high) == pytest.approx((25, 75, 100))


def test_a_stack_without_errors_has_no_bars(fp8):
    layers = read_facts(fp8).layers
    plain = [type(layer)(layer.index, layer.kind, (), 1, 1) for layer in layers]
    assert {column.step for column in stack_chart(plain).columns} == {0}
