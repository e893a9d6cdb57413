"""The configuration of NemotronH_Nano_VL_V2, so that no code of a checkpoint has to run.

config.json's `auto_map` names a Python module of the checkpoint, which vLLM imports only under
`--trust-remote-code`. With this class registered it is not asked for, whatever it contains.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, NemotronHConfig, PretrainedConfig

MODEL_TYPE = "NemotronH_Nano_VL_V2"


class RadioSettings(PretrainedConfig):
    """The vision tower's settings; vLLM builds its own configuration of the tower from `args`."""

    model_type = "radio_settings"

    def __init__(self, args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.args = args or {}
        super().__init__(**kwargs)


class NanoVLConfig(PretrainedConfig):
    """The language model's and the vision tower's settings, and how tiles become tokens.

    The fields of config.json are attributes; `llm_config` is found as `text_config` as well.
    """

    model_type = MODEL_TYPE
    is_composition = True

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = RadioSettings(**(vision_config or {}))
        language_model = dict(llm_config or {})
        language_model.pop("model_type", None)
        self.text_config = NemotronHConfig(**language_model)
        super().__init__(**kwargs)

    @property
    def llm_config(self) -> NemotronHConfig:
        """The language model's settings, under the name that config.json has."""
        return self.text_config

    def get_text_config(self, *arguments: Any, **kwargs: Any) -> NemotronHConfig:
        """Return the language model's settings."""
        return self.text_config


def register() -> None:
    """Make transformers know the class; a second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, NanoVLConfig, exist_ok=True)
