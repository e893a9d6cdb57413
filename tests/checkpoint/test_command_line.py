"""The command line that all commands share."""

import pytest

from checkpoint.command import command_parser, parse_command


@pytest.mark.parametrize(
    "line",
    ["recipe.yaml a=1 b=2 -v", "-v recipe.yaml a=1 b=2", "recipe.yaml -v a=1 b=2"],
)
def test_options_may_stand_before_after_and_among_the_words_of_a_list(line):
    parser = command_parser("quantize.fp8", "Quantizes.")
    parser.add_argument("words", nargs="*")
    parsed = parse_command(parser, line.split())
    assert parsed.words == ["recipe.yaml", "a=1", "b=2"]
    assert parsed.verbose


def test_after_two_dashes_nothing_is_an_option():
    parser = command_parser("benchmarks.memory", "Measures.")
    parser.add_argument("words", nargs="*")
    assert parse_command(parser, ["-q", "--", "timeit", "-v", "x"]).words == ["timeit", "-v", "x"]


def test_an_unknown_option_is_refused_by_name(capsys):
    parser = command_parser("quantize.fp8", "Quantizes.")
    parser.add_argument("words", nargs="*")
    with pytest.raises(SystemExit) as exit:
        parse_command(parser, ["a=1", "--unknown", "b=2"])
    assert exit.value.code == 2
    assert "--unknown" in capsys.readouterr().err
