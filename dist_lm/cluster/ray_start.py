"""`ray start` as a node starts it: `python -m dist_lm.cluster.ray_start PARENT ARGUMENTS...`; it dies with PARENT."""

import sys

from dist_lm.storage.process import die_with_parent


def main() -> None:
    """Run Ray's own program; it does not return while the node lives."""
    die_with_parent(int(sys.argv[1]))

    from ray.scripts.scripts import main as ray

    sys.argv[:] = ["ray", "start", *sys.argv[2:]]
    ray()


if __name__ == "__main__":
    main()
