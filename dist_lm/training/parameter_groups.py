"""Groups of parameters that gradients are looked at by."""

GROUPS = ("embedding", "attention", "feed_forward", "norm", "head")


def group_of(name: str) -> str:
    """Which of `GROUPS` a parameter belongs to; a head that shares the embedding's weight is of the embedding.

    Raises:
        ValueError: a name that no model of ours has.
    """
    parts = name.split(".")
    for part in parts:
        if part.endswith("norm"):
            return "norm"
        if part.endswith("head"):
            return "head"
        if part in GROUPS:
            return part
    raise ValueError(f"parameter {name}: of none of the groups {', '.join(GROUPS)}")
