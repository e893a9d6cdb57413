"""Makes the CUDA build of torchvision importable beside a CPU build of torch.

A .pth file calls `install` when the interpreter starts. There is no CPU build of torchvision on
PyPI, and vLLM's image processors import it for its transforms. Its C++ extension cannot load
without CUDA libraries, so `torchvision::nms` and `::qnms` are never declared, and `import
torchvision` fails where it registers their gradients ("operator torchvision::nms does not
exist"). Declaring the two is enough: the transforms are plain torch and Pillow. Nothing is
imported here until torchvision is.
"""

import importlib.abc
import sys

_LIBRARIES: list[object] = []
"""Keeps the declarations: a collected `Library` takes its operators with it."""


class DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Declares the missing operators on the first import of torchvision, then removes itself."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing, so that the import continues to the real torchvision."""
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
    _LIBRARIES.append(library)


def install() -> None:
    """Add the finder before all others, once."""
    if "torchvision" in sys.modules:
        return
    for finder in sys.meta_path:
        if isinstance(finder, DeclareBeforeImport):
            return
    sys.meta_path.insert(0, DeclareBeforeImport())
