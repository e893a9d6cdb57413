"""How many sequences fit: against what vLLM reports, and the faults of GPUs that are too small."""

import json
import os
import re
import shlex
import struct
from pathlib import Path

import pytest

from checkpoint.config import CheckpointConfig, read_config
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.memory import CPU_ALIGNMENT, cache_of
from serve.plan import memory_faults, room_for_sequences, sequence_limit, serving_plan
from serve.process import full_command
from serve.settings import ServeSettings, override
from serve.state_update import STATE_FLAG
from serve.vllm_flags import setting_values

MIB = 2**20
H200 = Gpu((9, 0), "NVIDIA H200", 143771 * MIB, 143100 * MIB)
H100 = Gpu((9, 0), "NVIDIA H100", 81559 * MIB, 81079 * MIB)
A10 = Gpu((8, 6), "NVIDIA A10", 23028 * MIB, 22500 * MIB)
BF16_SIZE = 26.36e9
FP8_SIZE = 15.40e9

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU_RESULTS = (
    "decode_fp8_h100.json",
    "decode_fp8_float16_h100.json",
    "decode_nvfp4_as_fp8_h100.json",
    "serving_table_h100.json",
)
WEIGHTS = {"fp8": "ptq_fp8_12b_h100_whole.json", "nvfp4": "ptq_nvfp4_12b_h100.json"}
"""Files that hold the size of an export of the 12B."""


def on(*gpus):
    return ServeEnvironment("python", (0, 33, 0), cuda_device(gpus), "0.2.1")


ON_CPU = ServeEnvironment("python", (0, 32, 0), CPU, "0.2.1")


@pytest.fixture
def checkpoint(full12b, tmp_path):
    """The 12B's configuration in a directory with a weight file of so many bytes: an empty header
    and holes.
    """

    def make(size):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", 2) + b"{}")
            file.truncate(int(size))
        return CheckpointConfig(tmp_path, full12b.raw)

    return make


def test_the_12bs_cache_and_state(full12b):
    """Six attention layers of eight heads of 128; 28 Mamba layers of 128 heads × 80 × 128."""
    cache = cache_of(full12b)
    assert cache.token_bytes == 24_576
    state = 28 * 128 * 80 * 128 * 4
    assert state < cache.sequence_bytes < 1.02 * state
    assert cache.state_blocks == 5
    halved = cache_of(full12b, ranks=2)
    assert halved.token_bytes == cache.token_bytes / 2
    assert halved.sequence_bytes == pytest.approx(cache.sequence_bytes / 2, rel=0.01)


@pytest.mark.server
def test_the_numbers_are_those_that_vllm_reports(server, tiny):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", log)
    assert found is not None
    room = room_for_sequences(read_config(tiny), server.settings, ON_CPU)
    assert room.sequences == pytest.approx(float(found[2]), rel=0.01)
    assert room.sequences * room.length == pytest.approx(int(found[1].replace(",", "")), rel=0.01)
    block = re.search(r"Setting attention block size to (\d+) tokens", log)
    assert room.cache.block_tokens == int(block[1])


def test_an_h200_holds_what_was_measured(checkpoint):
    """4.2 million tokens with the FP8 export and vLLM 0.32."""
    room = room_for_sequences(checkpoint(FP8_SIZE), ServeSettings(), on(H200))
    assert room.sequences * room.length == pytest.approx(4.2e6, rel=0.1)


def ours_on_a_gpu():
    """Every server of ours, by result file, and what vLLM printed about its memory."""
    for name in GPU_RESULTS:
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        servers = [result.get("baseline", {"is_plain": True})]
        servers += result.get("servers", {}).values()
        for variant in result.get("variants", {}).values():
            servers.append(variant["server"] | {"log": variant.get("log")})
        for server in servers:
            if not server["is_plain"] and server.get("log"):
                yield pytest.param(server, id=f"{name}: {server['name']}")


@pytest.mark.parametrize("server", ours_on_a_gpu())
def test_cache_and_weights_are_those_that_vllm_reported_on_an_h100(checkpoint, server):
    """Recorded by benchmarks of decoding and serving, with the cache's size given: in float32, with
    ReplaySSM, and with its state in float16. What a step takes is not among it.
    """
    file = WEIGHTS[server["directory"]]
    written = json.loads((RESULTS / file).read_text(encoding="utf-8"))["written_gb"] * 1e9
    log = "\n".join(server["log"]["log"])
    extra = shlex.split(server["flags"])
    if "mamba_ssm_cache_dtype to 'float32'" in log:
        # One was recorded when the setting `replayssm` did not choose the state's type yet.
        extra += [STATE_FLAG, "float32"]
    settings = override(ServeSettings(), setting_values(extra) | server["settings"])
    room = room_for_sequences(checkpoint(written), settings, on(H100), extra)
    found = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", log)
    assert room.sequences == pytest.approx(float(found[2]), abs=0.01)
    assert room.sequences * room.length == pytest.approx(int(found[1].replace(",", "")), rel=1e-5)
    block = re.search(r"Setting attention block size to (\d+) tokens", log)
    assert room.cache.block_tokens == int(block[1])
    assert written == pytest.approx(server["log"]["weights_gib"] * 2**30, rel=0.01)


def test_all_kinds_of_state_are_among_the_recorded_servers():
    assert len(list(ours_on_a_gpu())) == 4


def test_weights_and_step_leave_room_on_an_h100(checkpoint):
    config = checkpoint(BF16_SIZE)
    assert memory_faults(config, ServeSettings(), on(H100)) == []
    room = room_for_sequences(config, ServeSettings(), on(H100))
    assert room.memory.weights == int(BF16_SIZE)
    assert 1e9 < room.memory.step < 8e9
    assert room.pool == room.memory.allowed - room.memory.weights - room.memory.step


def test_no_more_sequences_are_prepared_for_than_fit(checkpoint):
    """With 8 GB for sequences vLLM 0.33 had 248 blocks on an H100, and ended because of its default
    of 1,024 sequences: "max_num_seqs (1024) exceeds available Mamba cache blocks (248)".
    """
    config = checkpoint(FP8_SIZE)
    given = ["--kv-cache-memory-bytes", "8000000000"]
    room = room_for_sequences(config, ServeSettings(), on(H100), given)
    assert room.pool // room.cache.block_bytes == 248
    assert sequence_limit(config, ServeSettings(), on(H100), given) == 41
    plan = [str(choice) for choice in serving_plan(config, ServeSettings(), on(H100), given)]
    assert any("at most 41 sequences" in line for line in plan)


@pytest.mark.parametrize("extra", [["--max-num-seqs", "7"], ["--max-num-seqs=7"]])
def test_a_number_of_sequences_that_is_given_stays(checkpoint, extra):
    assert sequence_limit(checkpoint(FP8_SIZE), ServeSettings(), on(H100), extra) is None


def test_a_gpu_that_holds_vllms_default_gets_no_flag(tiny):
    assert sequence_limit(read_config(tiny), ServeSettings(), on(H100)) is None


def test_the_command_carries_the_limit(checkpoint, tmp_path, full12b):
    config = checkpoint(FP8_SIZE)
    (tmp_path / "config.json").write_text(json.dumps(full12b.raw), encoding="utf-8")
    command = full_command(tmp_path, ServeSettings(), on(A10))
    limit = sequence_limit(config, ServeSettings(), on(A10))
    assert limit is not None
    assert command[command.index("--max-num-seqs") + 1] == str(limit)


def test_a_gpu_that_cannot_hold_the_weights_is_a_fault(checkpoint):
    (fault,) = memory_faults(checkpoint(BF16_SIZE), ServeSettings(), on(A10))
    assert "weights and one step need" in str(fault)
    assert "quantized export, or split it over more GPUs" in str(fault)


def test_the_length_that_fits_is_named_and_fits(checkpoint):
    config = checkpoint(FP8_SIZE)
    settings = override(ServeSettings(), {"gpu_memory_utilization": 0.27})
    (fault,) = memory_faults(config, settings, on(H100))
    assert "tokens does not fit beside the weights" in str(fault)
    length = int(re.search(r"--max-model-len (\d+)", str(fault))[1])
    assert 0 < length < config.max_length
    shorter = override(settings, {"max_model_len": length})
    assert memory_faults(config, shorter, on(H100)) == []
    longer = override(settings, {"max_model_len": length + 2000})
    assert len(memory_faults(config, longer, on(H100))) == 1


def test_two_gpus_hold_what_one_cannot(checkpoint):
    settings = override(ServeSettings(), {"tensor_parallel_size": 2, "max_model_len": 4096})
    assert memory_faults(checkpoint(BF16_SIZE), settings, on(A10, A10)) == []


def test_a_gpu_that_others_use_is_a_fault(checkpoint):
    busy = H100._replace(free=40e9)
    (fault,) = memory_faults(checkpoint(FP8_SIZE), ServeSettings(), on(busy))
    assert "40.0 GB are free" in str(fault)
    share = float(re.search(r"--gpu-memory-utilization ([\d.]+)", str(fault))[1])
    fitting = override(ServeSettings(), {"gpu_memory_utilization": share})
    assert memory_faults(checkpoint(FP8_SIZE), fitting, on(busy)) == []


def test_a_given_cache_that_holds_no_sequence_is_refused(checkpoint):
    config = checkpoint(FP8_SIZE)
    small = ["--kv-cache-memory-bytes", "1000000000"]
    (fault,) = memory_faults(config, ServeSettings(), on(H100), small)
    assert fault.where == "--kv-cache-memory-bytes"
    assert "1 GB hold no sequence of 131,072 tokens" in fault.what
    longest = int(fault.remedy.rpartition(" ")[2])
    assert memory_faults(config, ServeSettings(max_model_len=longest), on(H100), small) == []
    assert (
        len(memory_faults(config, ServeSettings(max_model_len=longest + 1), on(H100), small)) == 1
    )


@pytest.mark.parametrize("flag", ["--block-size", "--num-gpu-blocks-override", "--cpu-offload-gb"])
def test_what_divides_memory_otherwise_is_not_computed(checkpoint, flag):
    config = checkpoint(BF16_SIZE)
    extra = [flag, "8"]
    assert memory_faults(config, ServeSettings(), on(A10), extra) == []
    lines = "\n".join(map(str, serving_plan(config, ServeSettings(), on(A10), extra)))
    assert f"memory: not computed ({flag} divides it otherwise)" in lines


@pytest.mark.parametrize(
    ("key_type", "token_bytes"),
    [("auto", 24_576), ("bfloat16", 24_576), ("fp8", 12_288), ("fp8_e5m2", 12_288)],
)
def test_the_type_of_the_cache_that_is_given_counts(checkpoint, key_type, token_bytes):
    extra = ["--kv-cache-dtype", key_type]
    room = room_for_sequences(checkpoint(FP8_SIZE), ServeSettings(), on(H100), extra)
    assert room.cache.token_bytes == token_bytes


def test_a_type_of_the_cache_with_scales_is_not_computed(checkpoint):
    config = checkpoint(FP8_SIZE)
    extra = ["--kv-cache-dtype", "nvfp4"]
    lines = "\n".join(map(str, serving_plan(config, ServeSettings(), on(H100), extra)))
    assert "memory: not computed (--kv-cache-dtype nvfp4 divides it otherwise)" in lines


@pytest.mark.parametrize("length", ["auto", "-1"])
def test_a_length_that_vllm_chooses_is_what_fits(checkpoint, length):
    config = checkpoint(FP8_SIZE)
    settings = override(ServeSettings(), {"gpu_memory_utilization": 0.27})
    assert len(memory_faults(config, settings, on(H100))) == 1
    extra = ["--max-model-len", length]
    assert memory_faults(config, settings, on(H100), extra) == []
    room = room_for_sequences(config, settings, on(H100), extra)
    assert 0 < room.length < config.max_length
    assert room.sequences >= 1
    lines = "\n".join(map(str, serving_plan(config, settings, on(H100), extra)))
    assert f"of {room.length:,} tokens at once, the longest that fit" in lines


def test_sequences_that_are_given_are_named_beside_those_that_fit(checkpoint):
    config = checkpoint(FP8_SIZE)
    extra = ["--kv-cache-memory-bytes", "8000000000", "--max-num-seqs", "64"]
    lines = "\n".join(map(str, serving_plan(config, ServeSettings(), on(H100), extra)))
    assert "at once: at most 64 sequences (given; 41 of up to one block fit)" in lines


def test_a_given_pool_is_taken(checkpoint):
    config = checkpoint(FP8_SIZE)
    extra = ["--kv-cache-memory-bytes", "8000000000"]
    assert room_for_sequences(config, ServeSettings(), on(A10), extra).pool == 8e9


def test_the_space_that_the_user_gives_a_cpu_counts(full12b, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert room_for_sequences(full12b, ServeSettings(), ON_CPU).pool == 3 * 2**30


def test_a_block_on_a_cpu_is_a_multiple_of_vllms(full12b):
    assert cache_of(full12b, alignment=CPU_ALIGNMENT).block_tokens % CPU_ALIGNMENT == 0


def test_threads_follow_the_cores(full12b, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    lines = "\n".join(map(str, serving_plan(full12b, ServeSettings(), ON_CPU)))
    assert "16 threads for media (64 cores" in lines
