"""What the versions of PyTorch's FSDP call differently."""


def parameter_groups(state):
    """Those of an FSDP module; in torch 2.11 it has one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
