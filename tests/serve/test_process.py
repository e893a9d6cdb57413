"""The guard and the waiting, on a stub of vLLM; then one real vLLM that ends by itself, and one
whose parent is killed.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from commands import ROOMS, run_module
from editing import edit_tensors

from checkpoint.faults import BadInput
from serve import process
from serve.environment import CPU, ServeEnvironment
from serve.preflight import free_port
from serve.process import ServerDied, running_server
from serve.settings import ServeSettings
from serve.vllm_log import death_message

STUB = Path(__file__).with_name("stub_vllm.py")
ANY_PORT = ServeSettings(port=0)

START_SECONDS = 600
"""Most seconds that vLLM may take to start: half a minute where nothing else runs."""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """An environment whose interpreter is the stub, by mode; `.pids()` are the server's and its
    child's.
    """
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STUB))} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("STUB_PIDS", str(tmp_path / "pids"))

    def environment(mode):
        monkeypatch.setenv("STUB_MODE", mode)
        return ServeEnvironment(script, (0, 32, 0), CPU, "0.2.1")

    environment.pids = lambda: [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    return environment


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def gone(pids):
    # While it starts, vLLM does not answer SIGTERM: the grace period passes first.
    return wait_until(lambda: not any(map(alive, pids)), process.GRACE_SECONDS + 10)


def test_a_server_lives_as_long_as_its_block(tiny, stub):
    with running_server(tiny, ANY_PORT, environment=stub("serve")) as server:
        assert server.model == "stub"
        assert server.settings.port != 0
        assert urllib.request.urlopen(f"{server.url}/models").status == 200
        pids = stub.pids()
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_an_error_in_the_block_takes_the_server_down(tiny, stub):
    with (
        pytest.raises(ZeroDivisionError),
        running_server(tiny, ANY_PORT, environment=stub("serve")),
    ):
        1 / 0  # noqa: B018
    assert gone(stub.pids())


def test_a_server_that_ignores_sigterm_is_killed_with_its_child(tiny, stub, monkeypatch):
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    with running_server(tiny, ANY_PORT, environment=stub("stubborn")):
        pass
    assert gone(stub.pids())


def test_a_killed_guard_leaves_nothing(tiny, stub):
    with running_server(tiny, ANY_PORT, environment=stub("serve")) as server:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    assert gone(stub.pids())


def test_a_dying_server_is_reported_with_its_first_error_and_the_end_of_its_log(tiny, stub):
    with pytest.raises(ServerDied) as died, running_server(tiny, ANY_PORT, environment=stub("die")):
        pass
    first, *rest = str(died.value).splitlines()
    assert first.startswith("vLLM ended with status 3 after")
    assert first.endswith("ValueError: the root cause")
    assert rest[-1] == "  RuntimeError: Engine core initialization failed. See root cause above."


def faults_of(tiny, environment, *flags):
    """The fault of flags with which vLLM does not start."""
    with pytest.raises(BadInput) as bad, running_server(tiny, ANY_PORT, flags, None, environment):
        raise AssertionError("it never answers")
    (fault,) = bad.value.faults
    return str(fault)


def test_a_flag_that_ends_vllm_is_bad_input(tiny, stub):
    fault = faults_of(tiny, stub("refuse"), "--quantization", "zzz")
    assert fault.startswith("--quantization zzz: ends vLLM: Unknown quantization method: zzz. (")
    fault = faults_of(tiny, stub("die"), "--seed", "1", "--load-format=root")
    assert fault.startswith("--load-format root: ends vLLM: ValueError: the root cause")


def test_flags_that_vllm_refuses_together_are_bad_input(tiny, stub):
    fault = faults_of(tiny, stub("refuse"), "--seed", "1")
    assert "flags after --: vLLM refuses its configuration: Unknown quantization" in fault


def test_without_flags_a_refusal_is_no_fault_of_the_user(tiny, stub):
    with pytest.raises(ServerDied, match="ended with status 1"):
        with running_server(tiny, ANY_PORT, environment=stub("refuse")):
            raise AssertionError("it never answers")


def test_an_error_of_the_engine_is_no_fault_of_other_flags(tiny, stub):
    with pytest.raises(ServerDied, match="the root cause"):
        with running_server(tiny, ANY_PORT, ["--seed", "1"], environment=stub("die")):
            raise AssertionError("it never answers")


def starts_of(stub):
    return Path(os.environ["STUB_PIDS"] + ".starts").read_text().split()


def test_a_server_that_lost_a_port_to_another_process_is_started_again(tiny, stub):
    """vLLM looks for free ports for its processes long before it binds them; servers that start
    together find the same ones.
    """
    with running_server(tiny, ANY_PORT, environment=stub("taken once")) as server:
        assert urllib.request.urlopen(f"{server.url}/models").status == 200
    first, second = starts_of(stub)
    assert first != second
    assert second == str(server.settings.port)


def test_a_server_that_never_gets_its_ports_is_reported(tiny, stub):
    with pytest.raises(ServerDied, match="Address already in use"):
        with running_server(tiny, ANY_PORT, environment=stub("taken")):
            pass
    assert len(starts_of(stub)) == process.START_ATTEMPTS


def test_waiting_for_a_server_that_never_answers_ends(tiny, stub, monkeypatch):
    monkeypatch.setattr(process, "READY_SECONDS", 1.5)
    with pytest.raises(ServerDied, match="did not answer within"):
        with running_server(tiny, ANY_PORT, environment=stub("silent")):
            pass
    assert gone(stub.pids())


def test_a_flag_of_vllm_for_the_port_is_where_we_wait(tiny, stub):
    port = free_port("127.0.0.1")
    flags = ["--port", str(port)]
    with running_server(tiny, ANY_PORT, flags, environment=stub("serve")) as server:
        assert server.settings.port == port
        assert server.url == f"http://127.0.0.1:{port}/v1"


def test_flags_out_of_range_are_bad_input(tiny, stub):
    flags = ["--video-pruning-rate", "1.5"]
    with pytest.raises(BadInput, match=r"video\.pruning_rate: is 1\.5"):
        with running_server(tiny, ANY_PORT, flags, environment=stub("serve")):
            pass


@pytest.mark.parametrize("flags", [["--uds", "socket"], ["--headless"], ["--grpc"]])
def test_a_server_that_would_not_answer_at_its_port_is_not_waited_for(tiny, stub, flags):
    with pytest.raises(BadInput, match=f"{flags[0]}: lets vLLM answer nowhere"):
        with running_server(tiny, ANY_PORT, flags, environment=stub("silent")):
            pass


def test_a_message_without_a_log_is_what_happened_alone(tmp_path):
    (tmp_path / "log").touch()
    assert death_message(tmp_path / "log", "vLLM ended") == "vLLM ended"


def start(command):
    # Under nohup, SIGHUP would be ignored here and so in every child.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOMS
        )
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("command", "more"),
    [("serve", ["--dry-run", "--", "--seed", "7"]), ("serve.ask", ["--text", "a"])],
)
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated by SIGTERM"),
        (signal.SIGHUP, "terminated by SIGHUP"),
    ],
)
def test_a_command_that_is_ended_before_the_start_leaves_nothing(
    tiny, tmp_path, interpreter, command, more, number, said
):
    """The process that reads vLLM's flags takes ten seconds, and went on alone."""
    file = tmp_path / "pid"
    interpreter(f"echo $$ > {shlex.quote(str(file))}; exec sleep 60")
    parent = start([sys.executable, "-m", command, str(tiny), *more])
    assert wait_until(lambda: file.exists() and file.read_text())
    parent.send_signal(number)
    _, logged = parent.communicate(timeout=20)
    assert parent.returncode == 128 + number
    assert logged.splitlines()[-1] == said
    assert gone([int(file.read_text())])


@pytest.mark.parametrize("mode", ["serve", "silent"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -9)],
)
def test_however_the_command_ends_nothing_outlives_it(tiny, stub, number, status, mode):
    # The stub cannot answer the probe that finds an environment, so the command is given one.
    code = (
        "import sys; from pathlib import Path; from serve.__main__ import run;"
        "from serve.environment import CPU, ServeEnvironment;"
        f"python = Path({str(stub(mode).python)!r});"
        "environment = ServeEnvironment(python, (0, 32, 0), CPU, '0.2.1');"
        f"sys.exit(run([{str(tiny)!r}, '--port', '0'], environment))"
    )
    parent = start([sys.executable, "-c", code])
    if mode == "serve":
        assert "stub (BF16, EVS drops 75%" in parent.stdout.readline()
    pids_file = Path(os.environ["STUB_PIDS"])
    assert wait_until(lambda: pids_file.exists() and " " in pids_file.read_text())
    pids = stub.pids()
    parent.send_signal(number)
    _, logged = parent.communicate(timeout=20)
    assert parent.returncode == status
    assert "\nstarting vLLM: " in logged
    if status == 0:
        assert logged.splitlines()[-1] == "stopped"
    assert gone(pids)


@pytest.mark.server
def test_a_real_vllm_that_ends_is_reported_with_its_error(tiny_copy):
    """A tensor of the wrong shape passes every cheap check and ends vLLM half a minute later."""

    def shorten(tensors):
        tensors["language_model.backbone.norm_f.weight"] = torch.ones(128, dtype=torch.bfloat16)

    edit_tensors(tiny_copy, shorten)
    done = run_module("serve", tiny_copy, "--port", "0", timeout=START_SECONDS)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Error: " in error.removeprefix("error: ")
    assert "128" in error, error
    assert "last lines of" in done.stderr
    assert "Traceback" not in done.stderr.split("last lines of")[0]


@pytest.mark.server
def test_a_real_vllm_does_not_outlive_a_killed_parent(tiny):
    command = [sys.executable, "-m", "serve", str(tiny), "--port", "0"]
    parent = subprocess.Popen(
        command, cwd=ROOMS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tree: list[int] = []

    def engine_runs():
        tree[:] = descendants(parent.pid)
        return any("EngineCore" in command_line(pid) for pid in tree)

    assert wait_until(engine_runs, START_SECONDS), "EngineCore did not start"
    assert len(tree) >= 3
    parent.kill()
    parent.wait()
    assert gone(tree)


def descendants(root):
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = []
    generation = [root]
    while generation:
        generation = [pid for pid, parent in parents.items() if parent in generation]
        found += generation
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
