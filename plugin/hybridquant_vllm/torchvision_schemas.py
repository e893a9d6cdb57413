"""Lets the CUDA build of torchvision import beside a CPU build of torch; a .pth runs this at
interpreter start.

There is no CPU build of torchvision on the registry, and vLLM's image processors import it for its
transforms. Its C++ extension cannot load without CUDA libraries, so `torchvision::nms` and `::qnms`
are never declared, and `import torchvision` dies registering their gradients ("operator
torchvision::nms does not exist"). Declaring the two is enough: the transforms are plain torch and
Pillow. Nothing is imported here until somebody imports torchvision.
"""

import importlib.abc
import sys

_LIBRARIES: list[object] = []


class DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Declares the missing operators on the first import of torchvision, then steps aside."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing: the import goes on to the real torchvision."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare()


def declare() -> None:
    """Declare `torchvision::nms` and `::qnms` where torch has no CUDA; do nothing elsewhere."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None or _LIBRARIES:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # a collected Library takes its operators with it


def install() -> None:
    """Put the finder in front, once."""
    if "torchvision" not in sys.modules and not any(
        isinstance(f, DeclareBeforeImport) for f in sys.meta_path
    ):
        sys.meta_path.insert(0, DeclareBeforeImport())


install()
