"""Runs in the serve environment: which launch configuration vLLM takes for a batch size.

    python tests/serve/state_update_by_vllm.py DEVICE_NAME HEAD_DIM STATE_SIZE HEADS STATE BATCH…

Prints a JSON list of [BLOCK_SIZE_M, num_warps], in the order of the batch sizes.
"""

import json
import sys

from vllm.model_executor.layers.mamba.ops import mamba_ssm


def main():
    device, head_dim, state_size, heads, state, *batches = sys.argv[1:]
    mamba_ssm.get_ssm_device_name = lambda: device
    found = []
    for batch in batches:
        launch = mamba_ssm.try_get_optimal_ssm_config(
            int(head_dim), int(state_size), int(batch), int(heads), state, False
        )
        found.append(launch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
