"""`python -m quantize.qad` with FSDP2 on CPU processes, which accelerate 1.15 supports on
accelerators only.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from pipeline.command import front_door
from quantize import qad

_init = AcceleratorState.__init__


def _with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    front_door("quantize.qad", qad.__doc__, "tiny/nvfp4_qad.yaml", distils=True)
