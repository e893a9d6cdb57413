"""Configuration of NemotronH_Nano_VL_V2 for loaders that follow config.json's auto_map; holds no
model code.
"""

from transformers import NemotronHConfig, PretrainedConfig


class RadioSettings(PretrainedConfig):
    """The vision tower's settings; `args` is passed on as it stands."""

    model_type = "radio_settings"

    def __init__(self, args=None, **kwargs):
        self.args = args or {}
        super().__init__(**kwargs)


class NemotronH_Nano_VL_V2_Config(PretrainedConfig):
    """Top level: the language model's and the vision tower's settings and how tiles become tokens.
    """

    model_type = "NemotronH_Nano_VL_V2"
    is_composition = True

    def __init__(self, llm_config=None, vision_config=None, **kwargs):
        self.vision_config = RadioSettings(**(vision_config or {}))
        llm_config = dict(llm_config or {})
        llm_config.pop("model_type", None)
        self.text_config = NemotronHConfig(**llm_config)
        super().__init__(**kwargs)

    @property
    def llm_config(self):
        return self.text_config

    def get_text_config(self, *args, **kwargs):
        return self.text_config
