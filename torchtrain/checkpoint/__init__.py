"""Checkpoints: complete or not there, loadable on any layout, and never executed.

A checkpoint is the folder `checkpoint/step-N`:

    __R_0.distcp        the tensors, or slices of them, that rank R wrote
    .metadata           the index of torch's distributed checkpoint (DCP): where each slice is
    train_state.json    the rest: step, tokens seen, data state, resolved config, model's shape
    complete.json       the marker: size and digest (XXH3) of every other file

Tensors are stored by name: `model/<parameter>`, `optimizer/<parameter>/<state>`,
`rng/<rank>/<device type>`.

How a save commits. Everything goes into a fresh folder `.tmp-step-N-<random>`, hashed on its way to
the disk and synced; the marker is the last file; one rename to `step-N`, synced, is the commit.
Since a rename is atomic, `step-N` has its marker from its first instant, and a crash before leaves
a `.tmp-` folder that nothing takes for a checkpoint. Where a rename is not atomic (some network and
object stores copy), or after half a copy by hand, the sizes and digests in the marker tell. Removal
goes the other way: one rename, synced, takes the name `step-N` away from the whole checkpoint; then
its contents go.

Why not DCP alone: it has no notion of complete, overwrites a checkpoint in place, syncs a file
before flushing it, never syncs a folder, and its index is a pickle, which runs code when it is
loaded. The digests find damage; they do not prove who wrote the files, hence the restricted
unpickler. Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html and the code of
`torch.distributed.checkpoint`.

    saving          when to save, saving, how long a checkpoint is kept
    asynchronous    doing it beside training
    checkpointer    what a run resumes from, and loading it
    commit          the marker; inspecting and setting aside a folder
    digests         what finds damage, by the checkpoint's format
    state           the names of tensors; the optimizer's states, whatever the optimizer
    storage         files: hashing, DCP's writer and reader, the restricted index
    foreign         weights of Hugging Face's and torchtitan's folders
    hf_folder       reading any slice of a weight in a Hugging Face folder
"""

from torchtrain.checkpoint.checkpointer import Checkpointer
from torchtrain.checkpoint.commit import Progress, Source
from torchtrain.checkpoint.foreign import Foreign

__all__ = ["Checkpointer", "Foreign", "Progress", "Source"]
