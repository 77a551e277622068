"""Mixed precision: one contract, one meaning of `precision=` (fp32, tf32, bf16, fp16) for every strategy.

Parameters, gradient reductions, optimizer state and buffers are fp32 everywhere (DeepSpeed keeps fp32 masters
anyway; under FSDP2 bf16 parameters break BatchNorm). Compute runs under autocast in bf16 or fp16, or in fp32
with or without TF32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: str, cache: bool = True) -> AbstractContextManager[object]:
    """Mixed precision on `device`: autocast, with or without its cache of cast weights; none for fp32."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=AUTOCAST[precision], cache_enabled=cache)


def autocast_off(precision: str, device: str) -> AbstractContextManager[object]:
    """For a backward pass inside `autocast`: it runs in the dtypes that forward chose."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(torch.device(device).type, enabled=False)


def set_matmul_precision(precision: str) -> None:
    """Let fp32 matrix products and convolutions use TF32 under `tf32` only; cuDNN would by default."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def contract(precision: str, compress: str = "none") -> str:
    """The contract in one line, for the banner and the table of `parity`; `compress` as in `ddp.compress`."""
    compute = {
        "fp32": "fp32",
        "tf32": "tf32",
        "bf16": "bf16 autocast",
        "fp16": "fp16 autocast, dynamic loss scale",
    }
    reduce = "fp32" if compress == "none" else compress
    return f"parameters fp32, compute {compute[precision]}, reduce {reduce}, optimizer fp32, buffers fp32"


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., 2018), with the constants of
    `torch.amp.GradScaler`.

    Not GradScaler itself, because one must serve DDP, FSDP2 and ZeRO alike: the *global* gradient norm
    decides, so that all ranks skip the same steps without a further collective. The scale is a power of two:
    unscaling is exact.
    """

    INITIAL, GROWTH_INTERVAL = 2.0**16, 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = self.INITIAL if enabled else 1.0
        self.good_steps = 0

    def accept(self, grad_norm: Tensor) -> bool:
        """Whether to apply this step; adapts the scale of the next. Waits for the device under fp16 only."""
        if not self.enabled:
            return True
        if not bool(torch.isfinite(grad_norm)):
            self.value, self.good_steps = max(self.value / 2, 1.0), 0
            return False
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
        return True

    def restore(self, saved: Tensor) -> None:
        """Load a saved `[value, good_steps]`; what was saved in another precision is ignored."""
        value, good_steps = saved.tolist()
        if self.enabled and value > 1.0:
            self.value, self.good_steps = value, int(good_steps)
