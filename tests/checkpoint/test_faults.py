"""How commands end: bad input and a full disk with exit 2 and a sentence, a defect of ours with its
traceback.
"""

import errno
import fcntl

import pytest

from accuracy.endpoint import _one_line
from checkpoint.faults import FOREIGN, BadInput, Fault, main, nearest
from checkpoint.lock import LOCK, lock_faults
from checkpoint.memory import memory_advice
from pipeline.inputs import pick_device
from recipes.loading import SHIPPED, load_recipe
from serve.setup_environment import _pip_reason
from serve.vllm_log import death_message


def ending(error: Exception, capsys) -> tuple[int, str]:
    def run() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        main(run)
    return ended.value.code, capsys.readouterr().err


def test_bad_input_prints_every_fault_and_exits_2(capsys):
    bad = BadInput(Fault("a", "is wrong", "fix it"), Fault("b", "is wrong too"))
    status, printed = ending(bad, capsys)
    assert status == 2
    assert printed == "error: a: is wrong (fix it)\nerror: b: is wrong too\n"


def test_a_fault_that_was_found_twice_is_printed_once(capsys):
    same = Fault("a", "is wrong", "fix it")
    _, printed = ending(BadInput(same, Fault("b", "too"), Fault("a", "is wrong", "fix it")), capsys)
    assert printed == "error: a: is wrong (fix it)\nerror: b: too\n"


def test_of_many_faults_that_are_alike_only_the_first_are_printed(capsys):
    alike = [Fault(f"sample {number}", "is refused", "fix it") for number in range(40)]
    _, printed = ending(BadInput(*alike, Fault("b", "too")), capsys)
    lines = printed.splitlines()
    assert lines[4] == "error: sample 4: is refused (fix it)"
    assert lines[5:] == ["error: b: too", "error: … and 35 more"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_exits_2(number, capsys):
    status, printed = ending(OSError(number, "…", "/somewhere/out"), capsys)
    assert status == 2
    assert printed.startswith("error: /somewhere/out: ")


def test_a_defect_keeps_its_traceback():
    def run() -> int:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main(run)


def test_a_misspelt_name_is_answered_with_the_nearest_and_a_strange_one_with_all():
    assert nearest("chrt", ["chart", "table"]) == "did you mean chart?"
    assert nearest("xyz", ["chart", "table"]) == "choose from chart, table"


MEDIUM = "data:image/png;base64," + "A/b+" * 100_000
FOREIGN_TEXT = f"the server could not read\n{MEDIUM}\tthat is\x1b[31m why"


def out_of_memory(directory):
    error = MemoryError(FOREIGN_TEXT)
    with pytest.raises(BadInput) as caught, memory_advice(lambda: "a run", "wait"):
        raise error
    return caught.value.faults[0].what.removeprefix("a run: ")


def held(directory):
    with (directory / LOCK).open("w+") as file:
        file.write(FOREIGN_TEXT)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        (fault,) = lock_faults(directory)
    return fault.what.removeprefix("another run is working here: ")


def last_line_of_a_log(directory):
    line = FOREIGN_TEXT.replace("\n", " ")
    (directory / "log").write_text(f"{line}\n")
    return death_message(directory / "log", "ended").splitlines()[-1]


def unknown_device(directory):
    with pytest.raises(BadInput) as caught:
        pick_device(FOREIGN_TEXT)
    return str(caught.value)


def unknown_field(directory):
    with pytest.raises(BadInput) as caught:
        load_recipe(SHIPPED / "tiny" / "fp8.yaml", [f"calibrate.{MEDIUM}=1"])
    return str(caught.value)


@pytest.mark.parametrize(
    "show",
    [
        out_of_memory,
        held,
        last_line_of_a_log,
        unknown_device,
        unknown_field,
        lambda directory: _one_line(ValueError(FOREIGN_TEXT)),
        lambda directory: _pip_reason(f"ERROR: {FOREIGN_TEXT}"),
    ],
)
def test_foreign_text_is_one_short_line_without_its_media(tmp_path, show):
    shown = show(tmp_path)
    assert len(shown) <= 3 * FOREIGN
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert "A/b+" * 15 not in shown
