"""Resumable checkpoints: every rank writes its slices in the background, one rename commits them. No gather,
no pickle.

A checkpoint is a folder `step-NNNNNNNN`:

    rank-NNNNN.safetensors   the slices that one rank wrote, each 1-D, named as in the manifest
    manifest.json            step, progress, configuration, versions; size and digest of each file; of each
                             tensor dtype, shape and where it was cut: file `files[i]` holds the elements
                             [cuts[i], cuts[i+1]) of the flattened tensor, from byte `offsets[i]` on. So there
                             is no way to write down a gap or an overlap.

Tensors are named MODEL/model/PARAMETER, MODEL/optimizer/PARAMETER/KEY and MODEL/loss_scale. World size and
strategy of the writer do not matter to a reader, who asks for ranges. (A shard of columns, as tensor
parallelism makes them, is not one range but one for each of its rows: it would be written as so many cuts.)

What it is made of:

    manifest.py         the manifest: what it says, and whether that can be true
    tensor_file.py      safetensors files, written from one buffer and read by ranges
    directory.py        the checkpoints of a run: list, retention (keep the newest N), quarantine

Saving:

    saved_state.py      what of a run is saved
    snapshot.py         the state of a rank, copied into host memory
    writer.py           asynchronous, atomic: written and committed in the background

Loading:

    reader.py           one checkpoint, verified and read by ranges
    resume.py           find, verify, check, load: the checkpoint that a run continues from
    resume_compatibility.py  whether it may
    init_weights.py     `init=`: pretrained weights from elsewhere into a new run
    weight_sources.py   ... the files that they may come from
    name_matching.py    ... which name in the file is which name of the model

`rankzero ckpt`:

    inspection.py       the subcommands; ckpt_output.py: what they share
    describe.py         list, inspect
    compare.py          diff
    export.py           export: plain safetensors files, streamed
"""
