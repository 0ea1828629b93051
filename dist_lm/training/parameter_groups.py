"""Groups of parameters: those that gradients are looked at by, and those that Muon steps. No torch."""

MATRICES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.up.weight", "feed_forward.down.weight"),
)
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


def is_matrix(name: str) -> bool:
    """Whether Muon is for the parameter of this name: a matrix inside a block."""
    return name.endswith(MATRICES)
