"""The tiny checkpoint's tokenizer: words that its prompts repeat are one token each; everything
else is bytes.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint.config import CheckpointConfig
from checkpoint.tokenizer import write_tokenizer

WORDS = """
 Frame frame sampled at seconds System User Assistant think the a an of in is it to and on or
 with for from that this what which who how many read write answer only one word page image
 images video clip picture document chart table bar bars largest smallest value code text number
 color colour shows show changes change appears happened digit letter name city first second
 third last before after line red green blue yellow purple orange white black gray brown pink
 cyan circle square triangle star cross note total order date invoice report item items price
 quantity remember find key list following each was are be has
""".split()
"""Words that get a token each. Codes, digits and rare words stay bytes, as the tasks need them."""


def write_tiny_tokenizer(directory: Path, config: CheckpointConfig) -> None:
    """Write the tokenizer files of a tiny checkpoint into `directory`."""
    write_tokenizer(directory, config, WORDS)
