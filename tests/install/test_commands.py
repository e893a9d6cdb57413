import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hybridquant
from checkpoint.faults import BadInput

ROOT = Path(hybridquant.__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m hybridquant` in the folder of the modules."""
    command = [sys.executable, "-m", "hybridquant", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_help_fits_one_screen_and_names_every_command():
    lines = hybridquant.help_text().splitlines()
    assert len(lines) <= 24
    assert max(len(line) for line in lines) <= 80
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert shown == list(hybridquant.COMMANDS)


def test_every_command_has_a_module_that_python_can_run():
    for name, command in hybridquant.COMMANDS.items():
        for variant in command.variants or ("",):
            module, rest = hybridquant.find_module([name, *filter(None, [variant]), "a", "b=c"])
            assert rest == ["a", "b=c"]
            spec = importlib.util.find_spec(module)
            if spec.submodule_search_locations:
                spec = importlib.util.find_spec(f"{module}.__main__")
            assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def test_help_answers_in_under_a_second():
    done = run("--help")
    assert (done.returncode, done.stdout) == (0, hybridquant.help_text() + "\n")
    # Processor time of this one process, not the clock's: other tests may be running.
    command = [sys.executable, "-m", "hybridquant", "--help"]
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=silent)
    _, status, used = os.wait4(process, 0)
    assert status == 0
    assert used.ru_utime + used.ru_stime < 1


def test_help_and_version_import_nothing_heavy():
    code = (
        "import hybridquant, sys; hybridquant.run_command(['--help']);"
        "hybridquant.run_command(['--version']);"
        "print(sorted({'torch', 'transformers', 'modelopt', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy", "DIR"], "verfy: is not a command (did you mean verify?)"),
        (["quantize", "nvfp"], "quantize nvfp: is not a command (did you mean nvfp4?)"),
        (["quantize"], "quantize: is half of a command (add one of fp8, nvfp4, qad)"),
        (["fp8"], "fp8: is not a command (choose from accuracy, ask,"),
    ],
)
def test_an_unknown_command_is_one_sentence_with_the_nearest_one(arguments, message):
    with pytest.raises(BadInput) as caught:
        hybridquant.run_command(arguments)
    assert str(caught.value).startswith(message)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("line", "ordered"),
    [
        ("-v quantize fp8 a=1", "quantize fp8 -v a=1"),
        ("quantize -q fp8 a=1", "quantize fp8 -q a=1"),
        ("-vv quantize --quiet nvfp4", "quantize nvfp4 -vv --quiet"),
        ("--verbose verify DIR", "verify --verbose DIR"),
        ("verify -v DIR", "verify -v DIR"),
        ("-v --version", "--version -v"),
        ("-v", "-v"),
    ],
)
def test_verbosity_may_stand_in_front_of_a_command(line, ordered):
    assert hybridquant.in_order(line.split()) == ordered.split()


def test_an_unknown_command_exits_with_2():
    done = run("serv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: serv: is not a command (did you mean serve?)\n"


def test_no_command_shows_the_help_and_exits_with_2(capsys):
    assert hybridquant.run_command([]) == 2
    assert capsys.readouterr().err == hybridquant.help_text() + "\n"


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["quantize", "--help"]])
def test_the_overview_is_shown_for(arguments, capsys):
    assert hybridquant.run_command(arguments) == 0
    assert capsys.readouterr().out == hybridquant.help_text() + "\n"


def test_a_commands_own_help_and_exit_status_are_its_modules():
    done = run("ask", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m hybridquant ask")
    done = run("quantize", "fp8", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.yaml")


def test_every_command_names_itself_as_it_was_called():
    # In copies of a process that has imported nothing yet: the names are the whole process's.
    code = (
        "import hybridquant, os, sys\n"
        "for words in hybridquant.command_names('hybridquant').values():\n"
        "    sys.stdout.flush()\n"
        "    if os.fork() == 0:\n"
        "        hybridquant.run_command([*words.split()[1:], '--help'])\n"
        "    assert os.wait()[1] == 0, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = hybridquant.command_names("hybridquant")
    for words in names.values():
        assert f"usage: {words} [-h]" in done.stdout
    assert "usage: python -m" not in done.stdout
    for module in names:
        assert f"python -m {module} " not in done.stdout


def test_messages_name_commands_as_the_user_calls_them(tmp_path):
    recipe = "recipes/tiny/nvfp4_qad.yaml"
    remedy = "does not distil (run {} quantize qad, or give distill=null)"
    done = run("quantize", "fp8", recipe, f"output={tmp_path / 'out'}")
    assert remedy.format("python -m hybridquant") in done.stderr
    code = (
        "import hybridquant; hybridquant.run_command("
        f"['quantize', 'fp8', {recipe!r}, 'output={tmp_path / 'out'}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert remedy.format("hybridquant") in done.stderr


def test_the_version_is_shown_with_those_of_what_it_runs_on(capsys):
    assert hybridquant.run_command(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"hybridquant {hybridquant.__version__} (python 3.")
    assert all(f"{name} " in shown for name in hybridquant.REPORTED_PACKAGES)
