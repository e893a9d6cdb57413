"""How commands end: bad input and a full disk with exit 2 and a sentence, a defect of ours with its
traceback.
"""

import errno

import pytest

from checkpoint.faults import BadInput, Fault, main, nearest


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
