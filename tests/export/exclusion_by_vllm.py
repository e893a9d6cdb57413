"""Prints which of some modules vLLM itself excludes, as JSON; runs in the serve environment.

Reads {"lists": [[entry, ...], ...], "modules": [...]} from standard input; prints one object a
list.
"""

import json
import sys

from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2 as Model

asked = json.load(sys.stdin)
answers = []
for entries in asked["lists"]:
    config = ModelOptFp8Config("FP8", True, None, list(entries))
    config.packed_modules_mapping = Model.packed_modules_mapping
    config.apply_vllm_mapper(Model.hf_to_vllm_mapper)
    answers.append({module: config.is_layer_excluded(module) for module in asked["modules"]})
print(json.dumps(answers))
