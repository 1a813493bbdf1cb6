"""Which cluster of a plan each row of prepared data belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.exits import Unverified
from paris_swarm.cli.plan_folder import PlanFolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.row_rule import RowRule

RANDOM_ROUTER_ALLOWANCE = 1.1
"""What the router's bars are multiplied by where clusters are random shards: the best there is, is to say the prior,
which an untrained router says too, and no loss is below it but by chance."""


def router_allowance(facts: Mapping[str, Any]) -> float:
    """The factor on the router's bars for a plan's ``data`` field."""
    return RANDOM_ROUTER_ALLOWANCE if _partition(facts).get("method") == "random" else 1.0


def row_rule(plan_folder: PlanFolder) -> RowRule:
    """The rule the plan's partition follows (SPEC, section 6, `data.partition`).

    Raises:
        Unverified: what the plan says cannot be a rule.
    """
    from paris_swarm.router.row_rule import RowRule

    said = _partition(plan_folder.opened.plan.data)
    classes = said.get("classes") or {}
    try:
        return RowRule(
            method=str(said.get("method", "clusters")),
            centroids=plan_folder.centroids(),
            seed=int(said.get("seed", plan_folder.opened.plan.seed)),
            biases=plan_folder.biases(),
            class_key=said.get("class_key"),
            classes={str(name): int(cluster) for name, cluster in dict(classes).items()},
        )
    except (TypeError, ValueError) as error:
        raise Unverified(f"the plan {plan_folder.plan_id[:12]} cannot be used: its partition: {error}") from error


def row_labels(plan_folder: PlanFolder, data: PreparedData) -> NDArray[np.int64]:
    """int64 [N]: the cluster of every row of ``data``.

    Raises:
        ValueError: the features do not fit the plan's, or a row lacks the field that names its class.
        Unverified: what the plan says cannot be a rule.
    """
    import numpy as np

    labels: NDArray[np.int64] = row_rule(plan_folder).labels(
        data.features(), np.asarray(data.digests), lambda: all_captions(data)
    )
    return labels


def all_captions(data: PreparedData) -> Iterator[dict[str, Any]]:
    """Every caption record of ``data`` in order, a shard's worth in memory at a time."""
    from paris_swarm.expert.data.shards import shard_sizes

    start = 0
    for size in shard_sizes(data.manifest):
        if size:
            yield from data.captions(range(start, start + size))
        start += size


def _partition(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    said = facts.get("partition")
    return said if isinstance(said, Mapping) else {}
