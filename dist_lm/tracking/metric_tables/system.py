"""How busy the nodes of a run are. wandb gets these; they belong to no step, and so are not in the metrics file."""

from dist_lm.tracking.metric import TRAINING_STAGES, Metric

ONLY = "for wandb, where tracking=wandb"
ONLY_GPU = f"{ONLY} and nvidia-ml-py is installed on the nodes"
SYSTEM = (
    Metric(
        "system/cpu_percent_{node}",
        "%",
        "How busy all cores of a node are, whoever uses them.",
        "",
        TRAINING_STAGES,
        "system",
        ONLY,
    ),
    Metric(
        "system/memory_percent_{node}",
        "%",
        "Memory of a node that is in use, of what it has.",
        "",
        TRAINING_STAGES,
        "system",
        ONLY,
    ),
    Metric("system/memory_gib_{node}", "GiB", "Memory of a node that is in use.", "", TRAINING_STAGES, "system", ONLY),
    Metric(
        "system/gpu_percent_{gpu}",
        "%",
        "Share of the time in which a GPU (HOST.NUMBER) had work.",
        "higher",
        TRAINING_STAGES,
        "system",
        ONLY_GPU,
    ),
    Metric(
        "system/gpu_memory_gib_{gpu}",
        "GiB",
        "Memory of a GPU (HOST.NUMBER) that is in use, whoever uses it.",
        "",
        TRAINING_STAGES,
        "system",
        ONLY_GPU,
    ),
)
