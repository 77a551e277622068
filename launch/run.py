"""`rankzero train` as a file, for what starts one on each rank:

torchrun --nproc_per_node=2 launch/run.py recipe=resnet
srun python launch/run.py recipe=gpt strategy=fsdp
accelerate launch launch/run.py recipe=./mine.py
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a user's own `data.py` or `config.py` must not find ours
try:
    from launch.commands import main
except ModuleNotFoundError as missing:
    sys.exit(f"rankzero is not installed here ({missing}): pip install -e .")

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
