"""The forms of the tiny checkpoint that `benchmarks.tiny_accuracy` compares with BF16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.faults import Fault, nearest, raise_if_any


@dataclass(frozen=True)
class Form:
    """How a form is made.

    Attributes:
        recipe: Name of a recipe in recipes/tiny/.
        overrides: Changed fields of the recipe.
    """

    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def is_distilled(self) -> bool:
        """Whether its recipe distils."""
        return self.recipe == "nvfp4_qad"


VARIANTS = {
    "fp8": Form("fp8"),
    "nvfp4": Form("nvfp4"),
    "nvfp4_qat": Form("nvfp4_qad", ("distill.loss=cross_entropy",)),
    "nvfp4_qad": Form("nvfp4_qad"),
}


def split_rate(variant: str) -> tuple[str, str]:
    """Split `nvfp4_qad@3e-4` into a form and a learning rate, which is empty if none is given."""
    name, _, rate = variant.partition("@")
    return name, rate


def check_variants(names: Sequence[str]) -> None:
    """Check that every variant can be made.

    Raises:
        BadInput: With every unknown form and its nearest one, and every learning rate that is not
            one or does not belong to a form that is distilled.
    """
    faults = []
    for variant in names:
        name, rate = split_rate(variant)
        if name not in VARIANTS:
            faults.append(Fault("--variants", f"unknown form {name!r}", nearest(name, VARIANTS)))
        elif "@" in variant and not (VARIANTS[name].is_distilled and _is_rate(rate)):
            what = f"{variant!r} has no learning rate"
            faults.append(Fault("--variants", what, "write as in nvfp4_qad@3e-4"))
    raise_if_any(faults)


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
