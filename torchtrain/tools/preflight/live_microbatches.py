"""Which microbatches a pipeline rank holds at once: the schedule's own order of actions."""

from torchtrain.config.plans import PipelinePlan
from torchtrain.tools.preflight.pipeline_order import Orders, find_orders, list_parts


def list_actions(plan: PipelinePlan, ranks: int) -> Orders:
    """Return each rank's forwards and backwards in turn; of a pair, the forward comes first."""
    orders = find_orders(
        plan.schedule,
        ranks,
        plan.stages,
        plan.microbatches,
        whole_backward=plan.whole_backward,
    )
    return {
        rank: [part for action in order for part in list_parts(action)]
        for rank, order in orders.items()
    }
