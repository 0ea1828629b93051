"""The environment of the ranks."""

from pathlib import Path

from dist_lm.cluster.torchrun import rank_environment


def environment_of(environ: dict[str, str], **given: str) -> dict[str, str]:
    return rank_environment(
        environ, mark="m", logs=Path("logs"), device="cpu", cores_per_rank=2, interface="lo", given=given
    )


def test_what_a_user_has_set_for_threads_and_messages_stands():
    ours = environment_of({})
    assert ours["GOMP_SPINCOUNT"] == "30000"
    assert ours["GLOO_SOCKET_IFNAME"] == "lo"
    theirs = environment_of({"GOMP_SPINCOUNT": "7", "GLOO_SOCKET_IFNAME": "eth3"})
    assert (theirs["GOMP_SPINCOUNT"], theirs["GLOO_SOCKET_IFNAME"]) == ("7", "eth3")


def test_the_number_of_threads_is_ours_and_a_run_has_the_last_word():
    assert environment_of({"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "2"  # Ray's, for the agent
    assert environment_of({}, OMP_NUM_THREADS="5")["OMP_NUM_THREADS"] == "5"


def test_secrets_stay_behind():
    assert "WANDB_API_KEY" not in environment_of({"WANDB_API_KEY": "k" * 40})
