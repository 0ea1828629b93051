"""What the placement groups of a Ray cluster hold of its nodes."""

from collections import defaultdict

from dist_lm.cluster.pool_site import Reserved


def reserved_by_others(prefix: str) -> dict[str, Reserved]:
    """What groups whose names do not begin with `prefix` have got of each node, by Ray's id of the node.

    No two groups of Ray have one name, so those that belong together share a beginning.
    """
    from ray.util import placement_group_table

    cpus: dict[str, float] = defaultdict(float)
    gpus: dict[str, float] = defaultdict(float)
    for group in placement_group_table().values():
        if group["state"] != "CREATED" or group["name"].startswith(prefix):
            continue
        for bundle, node in group["bundles_to_node_id"].items():
            cpus[node] += group["bundles"][bundle].get("CPU", 0)
            gpus[node] += group["bundles"][bundle].get("GPU", 0)
    return {node: Reserved(int(cpus[node]), int(gpus[node])) for node in cpus}
