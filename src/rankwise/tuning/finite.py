"""Weights that are no numbers, found before anything is measured with them.

In: a live model. Out: nothing, or one message. The loss does not tell: a fused attention kernel turns a NaN in a query
into zeros, and all figures that follow are finite and wrong.
"""

from __future__ import annotations

from typing import Any

from rankwise.errors import NothingToMeasureError


def check_weights(model: Any, name: str) -> None:
    """Refuse a model one of whose weights holds NaN or infinity.

    Packed weights (integers, and floats of one byte) are passed over, and so are those that are not in memory.

    Args:
        model: a live module.
        name: what the message calls it.

    Raises:
        NothingToMeasureError: the first such weight is named.
    """
    import torch

    wrong = []
    for key, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() == 1 or weight.is_meta or not weight.numel():
            continue
        low, high = torch.aminmax(weight.detach())  # both are NaN where one entry is, and no copy is made
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            wrong.append(key)
    if wrong:
        more = f", as do {len(wrong) - 1:,} more weights" if len(wrong) > 1 else ""
        raise NothingToMeasureError(
            f"{name}: {wrong[0]} holds NaN or infinity{more}; what would be measured with it means nothing. Look at "
            "how the file was made, or take another checkpoint."
        )
