"""Resumable checkpoints: every rank writes its ranges behind the training, one rename commits them. No
gather, no pickle.

A checkpoint is a folder `step-NNNNNNNN`:

    rank-NNNNN.safetensors   the ranges that one rank wrote, each 1-D, named as in the manifest
    manifest.json            step, progress, configuration, versions; size and digest of each file; of each tensor dtype, shape
                             and where it was cut: file `files[i]` holds the elements [cuts[i], cuts[i+1]) of the flattened
                             whole, from byte `offsets[i]` on. So there is no way to write down a gap or an overlap.

Tensors are named MODEL/model/PARAMETER, MODEL/optimizer/PARAMETER/KEY and MODEL/loss_scale. World size and
strategy of the writer do not matter to a reader, who asks for ranges. (A shard of columns, as tensor
parallelism makes them, is not one range but one for each of its rows: it would be written as so many cuts.)

    manifest.py    the manifest: what it says, and whether it can be true
    ranges.py      safetensors files, written from one buffer and read by ranges of bytes
    tensors.py     and as tensors
    snapshot.py    the state of a rank, copied into host memory
    saver.py       written and committed in the background
    shelf.py       the checkpoints of a run: which there are, which are kept
    reader.py      one checkpoint, verified and read by ranges
    resume.py      which one a run goes on from, and whether it may
    weights.py     `init=`: weights from elsewhere into a fresh run
    names.py       which name in there is which name of the model
    export.py      plain safetensors or torch files, streamed
    describe.py, compare.py, console.py    what `launch/commands/ckpt.py` shows
"""
