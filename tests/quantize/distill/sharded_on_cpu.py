"""`python -m quantize.qad` with FSDP2 on CPU processes, which accelerate 1.15 supports on
accelerators only.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from pipeline.command import front_door
from quantize import qad
from quantize.distill.trainer import DistillationTrainer

_init = AcceleratorState.__init__


def _with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


_training_step = DistillationTrainer.training_step


def _checked_step(self, model, *arguments, **options):
    """Run a step, and check that its gradients are divided: whole ones would not fit on a GPU."""
    loss = _training_step(self, model, *arguments, **options)
    given = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert given
    assert all(isinstance(gradient, DTensor) for gradient in given)
    return loss


if __name__ == "__main__":
    DistillationTrainer.training_step = _checked_step
    AcceleratorState.__init__ = _with_fsdp
    front_door("quantize.qad", qad.__doc__, "tiny/nvfp4_qad.yaml", distils=True)
