"""The layouts that `torchtrain.tools.parity` compares, as data: one line each."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """One line of the table."""

    ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options that make the layout; the reference does without them."""
    task: str = "plain"
    """What is trained, a key of `TASKS`: the reference trains the same."""


@dataclass(frozen=True)
class Task:
    """What a layout and its reference have in common beyond the config."""

    overrides: dict[str, Any] = field(default_factory=dict)
    hide_labels: bool = False
    """Whether the number of valid labels is made very unequal over samples, and so over ranks,
    microbatches and shards."""
    shrunk: dict[str, Any] = field(default_factory=dict)
    """What it takes of the model that is made small for the whole table, and of no other."""


DOCUMENTS = {
    "training.document_masking": True,
    "experimental.custom_import": "torchtrain.tools.short_documents",
    "training.dataset": "short-documents",
    "training.dataset_path": None,
}
EXPERTS = {
    "model.n_experts": 4,
    "model.expert_hidden_dim": 64,
    "model.n_shared_experts": 1,
    "model.n_dense_layers": 1,
    "model.qk_norm": True,
    "model.router_bias": True,
    "router.balance_loss_weight": 0.01,
    "router.z_loss_weight": 0.001,
}
WIDE_HEADS = {"model.head_width": 16}  # as masks of documents need them on a GPU
# Newton-Schulz in fp32: in bf16 the weights would show its rounding.
MUON = {"optimizer.name": "Muon", "optimizer.muon_ns_dtype": "float32"}
TASKS = {
    "plain": Task(),
    "tied": Task({"model.tied_embeddings": True}),
    "labels": Task(hide_labels=True),
    "labels-tied": Task({"model.tied_embeddings": True}, hide_labels=True),
    "experts": Task(EXPERTS),
    "experts-labels": Task(EXPERTS, hide_labels=True),
    # No choice that rounding to bf16 could turn; fewer experts than ranks.
    "experts-all": Task(EXPERTS | {"model.n_experts": 2, "model.experts_per_token": 2}),
    "experts-documents": Task(EXPERTS | DOCUMENTS, shrunk=WIDE_HEADS),
    "documents": Task(DOCUMENTS, shrunk=WIDE_HEADS),
    "documents-packed": Task(DOCUMENTS | {"data.packing": "best_fit"}, shrunk=WIDE_HEADS),
    "documents-tied": Task(DOCUMENTS | {"model.tied_embeddings": True}, shrunk=WIDE_HEADS),
    "muon": Task(MUON),
    "muon-tied": Task(MUON | {"model.tied_embeddings": True}),
    "muon-experts": Task(MUON | EXPERTS),
}

REPLICATE_2 = {"parallelism.data_parallel_replicate_degree": 2}
MICROBATCH_1 = {"training.local_batch_size": 1}
TP_2 = {"parallelism.tensor_parallel_degree": 2}
TP_4 = {"parallelism.tensor_parallel_degree": 4}
NO_SEQUENCE = {"parallelism.disable_sequence_parallel": True}
NO_LOSS = {"parallelism.disable_loss_parallel": True}
EP_2 = {"parallelism.expert_parallel_degree": 2}
EP_4 = {"parallelism.expert_parallel_degree": 4}
CP_2 = {"parallelism.context_parallel_degree": 2}
CP_4 = {"parallelism.context_parallel_degree": 4}
ALL_TO_ALL = {"parallelism.context_parallel_rotate_method": "alltoall"}
ULYSSES = {"parallelism.context_parallel_method": "ulysses"}
IN_ORDER = {"parallelism.context_parallel_load_balancer": "none"}
ALWAYS = {"parallelism.fsdp_reshard_after_forward": "always"}
FULL = {"activation_checkpoint.mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective"}
SELECTIVE_OP = SELECTIVE | {"activation_checkpoint.selective_ac_option": "op"}
COMPILE = {"compile.enable": True}
BUDGET = COMPILE | {"activation_checkpoint.mode": "memory_budget"}
OFFLOAD = {"training.enable_cpu_offload": True}
BF16 = {"training.mixed_precision_param": "bfloat16"}
NS_BF16 = {"optimizer.muon_ns_dtype": "bfloat16"}


def pipeline(schedule: str, ranks: int = 2) -> dict[str, Any]:
    """Return the options of a pipeline under this schedule."""
    return {
        "parallelism.pipeline_parallel_degree": ranks,
        "parallelism.pipeline_parallel_schedule": schedule,
    }


PP_2 = pipeline("1F1B")
INTERLEAVED = pipeline("Interleaved1F1B")
ZERO_BUBBLE = pipeline("InterleavedZeroBubble")
ZBV = pipeline("ZBVZeroBubble")
DUAL_PIPE = pipeline("DualPipeV")
BATCHES_OF_4 = {"training.local_batch_size": 4}
PAIRS = {"parallelism.pipeline_parallel_microbatch_size": 2}
UNEVEN = {
    "parallelism.module_fqns_per_model_part": [
        ["tok_embeddings", "layers.0", "layers.1", "layers.2"],
        ["layers.3", "norm", "output"],
    ]
}

IN_TURN = {"parallelism.pipeline_parallel_expert_parallel_overlap": False}
SCHEDULES = {
    "gpipe": pipeline("GPipe"),
    "1f1b": PP_2,
    "interleaved": INTERLEAVED,
    "interleaved-zb": ZERO_BUBBLE,
    "zbv": ZBV,
    "dualpipev": DUAL_PIPE,
}
RECOMPUTATIONS = {
    "": {},
    "-full-ac": FULL,
    "-selective-ac": SELECTIVE,
    "-selective-op-ac": SELECTIVE_OP,
}

LAYOUTS = {
    "accumulate": Layout(1, MICROBATCH_1),
    "full-ac": Layout(1, FULL),
    "selective-ac": Layout(1, SELECTIVE),
    "selective-op-ac": Layout(1, SELECTIVE_OP),
    "budget-ac": Layout(1, BUDGET),
    "compile": Layout(1, COMPILE),
    "offload": Layout(1, OFFLOAD),
    "bf16": Layout(1, BF16),
    "accumulate-labels": Layout(1, MICROBATCH_1, "labels"),
    "accumulate-documents": Layout(1, MICROBATCH_1, "documents"),
    "full-ac-documents": Layout(1, FULL, "documents"),
    "selective-op-ac-documents": Layout(1, SELECTIVE_OP, "documents"),
    "fsdp2": Layout(2),
    "fsdp2-always": Layout(2, ALWAYS),
    "fsdp2-never": Layout(2, {"parallelism.fsdp_reshard_after_forward": "never"} | MICROBATCH_1),
    "fsdp2-accumulate": Layout(2, MICROBATCH_1),
    "fsdp2-full-ac": Layout(2, FULL),
    "fsdp2-compile": Layout(2, COMPILE | SELECTIVE_OP),
    "fsdp2-offload": Layout(2, OFFLOAD | MICROBATCH_1),
    "fsdp2-tied": Layout(2, MICROBATCH_1, "tied"),
    "fsdp2-labels": Layout(2, MICROBATCH_1, "labels"),
    "fsdp2-bf16": Layout(2, BF16),
    "fsdp2-documents": Layout(2, MICROBATCH_1, "documents"),
    "fsdp2-documents-packed": Layout(2, MICROBATCH_1, "documents-packed"),
    "fsdp2-compile-documents": Layout(2, COMPILE | SELECTIVE_OP, "documents"),
    "replicate2": Layout(2, REPLICATE_2),
    "tp2": Layout(2, TP_2),
    "tp2-no-sequence": Layout(2, TP_2 | NO_SEQUENCE),
    "tp2-no-loss": Layout(2, TP_2 | NO_LOSS),
    "tp2-no-sequence-no-loss": Layout(2, TP_2 | NO_SEQUENCE | NO_LOSS),
    "tp2-selective-ac": Layout(2, TP_2 | SELECTIVE),
    "tp2-compile": Layout(2, TP_2 | COMPILE),
    "tp2-offload": Layout(2, TP_2 | OFFLOAD),
    "tp2-tied": Layout(2, TP_2 | MICROBATCH_1, "tied"),
    "tp2-labels": Layout(2, TP_2 | MICROBATCH_1, "labels"),
    "tp2-bf16": Layout(2, TP_2 | BF16),
    "tp2-documents": Layout(2, TP_2, "documents"),
    "cp2": Layout(2, CP_2),
    "cp2-in-order": Layout(2, CP_2 | IN_ORDER),
    "cp2-alltoall": Layout(2, CP_2 | ALL_TO_ALL),
    "cp2-alltoall-in-order": Layout(2, CP_2 | ALL_TO_ALL | IN_ORDER),
    "cp2-ulysses": Layout(2, CP_2 | ULYSSES),
    "cp2-ulysses-in-order": Layout(2, CP_2 | ULYSSES | IN_ORDER),
    "cp2-full-ac": Layout(2, CP_2 | FULL),
    "cp2-compile": Layout(2, CP_2 | COMPILE),
    "cp2-tied": Layout(2, CP_2 | MICROBATCH_1, "tied"),
    "cp2-labels": Layout(2, CP_2 | MICROBATCH_1, "labels"),
    "cp2-bf16": Layout(2, CP_2 | BF16),
    "cp2-ulysses-documents": Layout(2, CP_2 | ULYSSES, "documents"),
    "pp2-gpipe": Layout(2, pipeline("GPipe")),
    "pp2-1f1b": Layout(2, PP_2),
    "pp2-1f1b-accumulate": Layout(2, PP_2 | BATCHES_OF_4 | PAIRS),
    "pp2-1f1b-uneven": Layout(2, PP_2 | UNEVEN),
    "pp2-1f1b-always": Layout(2, PP_2 | ALWAYS),
    "pp2-interleaved": Layout(2, INTERLEAVED),
    "pp2-interleaved-zb": Layout(2, ZERO_BUBBLE),
    "pp2-zbv": Layout(2, ZBV),
    "pp2-dualpipev": Layout(2, DUAL_PIPE),
    "pp2-gpipe-full-ac": Layout(2, pipeline("GPipe") | FULL),
    "pp2-1f1b-selective-op-ac": Layout(2, PP_2 | SELECTIVE_OP),
    "pp2-interleaved-budget-ac": Layout(2, INTERLEAVED | BUDGET),
    "pp2-interleaved-zb-full-ac": Layout(2, ZERO_BUBBLE | FULL),
    "pp2-zbv-selective-op-ac": Layout(2, ZBV | SELECTIVE_OP),
    "pp2-dualpipev-selective-ac": Layout(2, DUAL_PIPE | SELECTIVE),
    "pp2-1f1b-compile": Layout(2, PP_2 | COMPILE),
    "pp2-zbv-compile": Layout(2, ZBV | COMPILE),
    "pp2-1f1b-offload": Layout(2, PP_2 | OFFLOAD),
    "pp2-1f1b-tied": Layout(2, PP_2 | BATCHES_OF_4, "tied"),
    "pp2-zbv-tied": Layout(2, ZBV, "tied"),
    "pp2-1f1b-labels": Layout(2, PP_2 | BATCHES_OF_4, "labels"),
    "pp2-dualpipev-labels": Layout(2, DUAL_PIPE, "labels"),
    "pp2-1f1b-bf16": Layout(2, PP_2 | BF16),
    "pp2-zbv-bf16": Layout(2, ZBV | BF16),
    "pp2-1f1b-documents": Layout(2, PP_2 | BATCHES_OF_4 | PAIRS, "documents"),
    "pp2-interleaved-zb-documents": Layout(2, ZERO_BUBBLE, "documents"),
    "pp2-zbv-documents": Layout(2, ZBV, "documents-tied"),
    "pp2-dualpipev-compile-documents": Layout(2, DUAL_PIPE | COMPILE, "documents"),
    "fsdp4": Layout(4),
    "hsdp2x2-documents": Layout(4, REPLICATE_2, "documents"),
    "hsdp2x2": Layout(4, REPLICATE_2),
    "hsdp2x2-accumulate-labels": Layout(4, REPLICATE_2 | MICROBATCH_1, "labels"),
    "replicate4": Layout(4, {"parallelism.data_parallel_replicate_degree": 4}),
    "tp4": Layout(4, TP_4),
    "cp4": Layout(4, CP_4),
    "cp4-alltoall": Layout(4, CP_4 | ALL_TO_ALL),
    "cp4-ulysses": Layout(4, CP_4 | ULYSSES),
    "fsdp2-tp2": Layout(4, TP_2),
    "fsdp2-tp2-tied-full-ac": Layout(4, TP_2 | FULL, "tied"),
    "fsdp2-cp2": Layout(4, CP_2),
    "fsdp2-cp2-labels": Layout(4, CP_2 | MICROBATCH_1, "labels"),
    "replicate2-tp2": Layout(4, TP_2 | REPLICATE_2),
    "replicate2-cp2": Layout(4, CP_2 | REPLICATE_2),
    "tp2-cp2": Layout(4, TP_2 | CP_2),
    "tp2-cp2-ulysses-tied": Layout(4, TP_2 | CP_2 | ULYSSES, "tied"),
    "pp4-gpipe": Layout(4, pipeline("GPipe", 4)),
    "pp4-1f1b": Layout(4, pipeline("1F1B", 4)),
    "fsdp2-pp2-1f1b": Layout(4, PP_2),
    "fsdp2-pp2-gpipe-always": Layout(4, pipeline("GPipe") | ALWAYS),
    "fsdp2-pp2-interleaved-always": Layout(4, INTERLEAVED | ALWAYS),
    "fsdp2-pp2-interleaved-zb": Layout(4, ZERO_BUBBLE),
    "fsdp2-pp2-zbv": Layout(4, ZBV),
    "fsdp2-pp2-zbv-bf16": Layout(4, ZBV | BF16),
    "fsdp2-pp2-dualpipev": Layout(4, DUAL_PIPE),
    "fsdp2-pp2-interleaved-compile": Layout(4, INTERLEAVED | COMPILE),
    "fsdp2-pp2-1f1b-tied-full-ac": Layout(4, PP_2 | FULL, "tied"),
    "fsdp2-pp2-zbv-tied-labels": Layout(4, ZBV, "labels-tied"),
    "replicate2-pp2-1f1b": Layout(4, PP_2 | REPLICATE_2),
    "tp2-pp2-1f1b": Layout(4, PP_2 | TP_2),
    "tp2-pp2-1f1b-no-sequence-no-loss": Layout(4, PP_2 | TP_2 | NO_SEQUENCE | NO_LOSS),
    "tp2-pp2-zbv": Layout(4, ZBV | TP_2),
    "tp2-pp2-interleaved-compile-tied": Layout(4, INTERLEAVED | TP_2 | COMPILE, "tied"),
    "cp2-pp2-1f1b": Layout(4, PP_2 | CP_2),
    "cp2-pp2-dualpipev-labels": Layout(4, DUAL_PIPE | CP_2, "labels"),
    "fsdp2-tp2-full-ac-compile": Layout(4, TP_2 | FULL | COMPILE),
    "fsdp2-cp2-full-ac-compile": Layout(4, CP_2 | FULL | COMPILE),
    "replicate2-tp2-full-ac-compile": Layout(4, TP_2 | REPLICATE_2 | FULL | COMPILE),
    "fsdp2-pp2-1f1b-full-ac-compile": Layout(4, PP_2 | FULL | COMPILE),
    "tp2-pp2-1f1b-full-ac-compile": Layout(4, PP_2 | TP_2 | FULL | COMPILE),
    "fsdp2-tp2-pp2-1f1b-full-ac-compile": Layout(8, PP_2 | TP_2 | FULL | COMPILE),
    "tp2-pp2-zbv-documents": Layout(4, ZBV | TP_2, "documents"),
    "cp2-pp2-1f1b-documents": Layout(4, PP_2 | CP_2 | ULYSSES | IN_ORDER, "documents"),
    "experts-full-ac": Layout(1, FULL, "experts"),
    "experts-selective-ac": Layout(1, SELECTIVE, "experts"),
    "experts-selective-op-ac": Layout(1, SELECTIVE_OP, "experts"),
    "experts-budget-ac": Layout(1, BUDGET, "experts"),
    "experts-compile": Layout(1, COMPILE, "experts"),
    "experts-fsdp2": Layout(2, MICROBATCH_1, "experts"),
    "experts-tp2": Layout(2, TP_2, "experts"),
    "experts-tp2-no-sequence": Layout(2, TP_2 | NO_SEQUENCE, "experts"),
    "experts-tp2-no-loss": Layout(2, TP_2 | NO_LOSS, "experts"),
    "experts-cp2": Layout(2, CP_2, "experts"),
    "experts-pp2-zbv": Layout(2, ZBV, "experts"),
    "ep2": Layout(2, EP_2, "experts"),
    "ep2-full-ac": Layout(2, EP_2 | FULL | MICROBATCH_1, "experts"),
    "ep2-selective-ac": Layout(2, EP_2 | SELECTIVE, "experts"),
    "ep2-selective-op-ac": Layout(2, EP_2 | SELECTIVE_OP, "experts"),
    "ep2-always": Layout(2, EP_2 | ALWAYS | MICROBATCH_1, "experts"),
    "ep2-offload": Layout(2, EP_2 | OFFLOAD | MICROBATCH_1, "experts"),
    "ep2-compile": Layout(2, EP_2 | COMPILE, "experts"),
    "ep2-labels": Layout(2, EP_2 | MICROBATCH_1, "experts-labels"),
    "ep2-documents": Layout(2, EP_2, "experts-documents"),
    "ep2-bf16": Layout(2, EP_2 | BF16, "experts-all"),
    "ep2-compile-selective-op-ac": Layout(2, EP_2 | COMPILE | SELECTIVE_OP, "experts"),
    "ep2-tp2": Layout(2, EP_2 | TP_2, "experts"),
    "ep2-cp2": Layout(2, EP_2 | CP_2, "experts"),
    "ep2-cp2-ulysses": Layout(2, EP_2 | CP_2 | ULYSSES, "experts"),
    "ep4": Layout(4, EP_4, "experts"),
    "ep2-fsdp2": Layout(4, EP_2, "experts"),
    "ep2-fsdp2-all": Layout(4, EP_2 | MICROBATCH_1, "experts-all"),
    "ep2-hsdp": Layout(4, EP_2 | REPLICATE_2, "experts"),
    "ep4-tp2": Layout(4, EP_4 | TP_2, "experts"),
    "ep2-tp2-cp2": Layout(4, EP_2 | TP_2 | CP_2, "experts"),
    "ep2-tp2-pp2-zbv": Layout(4, EP_2 | TP_2 | ZBV, "experts"),
    "ep2-cp2-pp2-dualpipev": Layout(4, EP_2 | CP_2 | DUAL_PIPE | IN_TURN, "experts"),
    **{
        f"ep2-pp2-{schedule}{recomputation}": Layout(4, EP_2 | order | mode, "experts")
        for schedule, order in SCHEDULES.items()
        for recomputation, mode in RECOMPUTATIONS.items()
    },
    "ep2-pp2-dualpipev-in-turn": Layout(4, EP_2 | DUAL_PIPE | IN_TURN, "experts"),
    "fsdp2-tp2-pp2-1f1b": Layout(8, PP_2 | TP_2),
    "fsdp2-tp2-pp2-zbv-full-ac": Layout(8, ZBV | TP_2 | FULL),
    "muon-fsdp2": Layout(2, MICROBATCH_1, "muon"),
    "muon-fsdp2-offload": Layout(2, OFFLOAD, "muon"),
    "muon-fsdp2-ns-bf16": Layout(2, NS_BF16, "muon"),
    "muon-fsdp2-bf16": Layout(2, BF16 | NS_BF16, "muon"),
    "muon-replicate2": Layout(2, REPLICATE_2, "muon"),
    "muon-tp2": Layout(2, TP_2, "muon"),
    "muon-tp2-tied": Layout(2, TP_2, "muon-tied"),
    "muon-cp2": Layout(2, CP_2, "muon"),
    "muon-pp2-zbv": Layout(2, ZBV, "muon"),
    "muon-ep2": Layout(2, EP_2, "muon-experts"),
    "muon-experts-tp2": Layout(2, TP_2, "muon-experts"),
    "muon-hsdp2x2": Layout(4, REPLICATE_2, "muon"),
    "muon-fsdp2-tp2": Layout(4, TP_2, "muon"),
    "muon-fsdp2-pp2-1f1b-tied": Layout(4, PP_2, "muon-tied"),
    "muon-ep2-fsdp2": Layout(4, EP_2, "muon-experts"),
    "muon-ep2-hsdp": Layout(4, EP_2 | REPLICATE_2, "muon-experts"),
    "muon-ep4-tp2": Layout(4, EP_4 | TP_2, "muon-experts"),
    "muon-ep2-tp2-pp2-zbv": Layout(4, EP_2 | TP_2 | ZBV, "muon-experts"),
    "muon-fsdp2-tp2-pp2-zbv": Layout(8, ZBV | TP_2, "muon"),
}
