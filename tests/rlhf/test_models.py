"""Two pieces of work side by side: the same results, and the same numbers as one after the other."""

import threading
from dataclasses import replace

import pytest
import torch

from dist_lm.parallel.mesh import World
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.models import RunBoth, one_after_other, own_threads
from tests.patience import patient
from tests.rlhf.toy import LENGTH, Toy, tensors_of, toy

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_both_run_at_once_each_on_its_half_of_the_threads(two_threads):
    meeting = threading.Barrier(2, timeout=patient(60))

    def threads() -> tuple[str, int]:
        meeting.wait()
        return threading.current_thread().name, torch.get_num_threads()

    with own_threads(World(rank=0, local_rank=0, size=1, device=CPU)) as run_both:
        for _ in range(3):
            (one, its), (other, others) = run_both(threads, threads)
            assert one != other
            assert its == others == 1
            assert torch.get_num_threads() == 2


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_among_others_and_one_with_one_thread_do_one_after_the_other(size, two_threads):
    torch.set_num_threads(size)
    with own_threads(World(rank=0, local_rank=0, size=size, device=CPU)) as run_both:
        assert run_both is one_after_other
    order: list[int] = []
    assert one_after_other(lambda: order.append(1), lambda: order.append(2)) == (None, None)
    assert order == [1, 2]


@pytest.mark.parametrize("failing", [(True, False), (False, True), (True, True)])
def test_an_error_of_either_comes_out_when_both_have_ended(failing, two_threads):
    ended = []

    def work(name: str, fails: bool) -> None:
        ended.append(name)
        if fails:
            raise ValueError(name)

    with own_threads(World(rank=0, local_rank=0, size=1, device=CPU)) as run_both:
        with pytest.raises(ValueError, match="first" if failing[0] else "second") as caught:
            run_both(lambda: work("first", failing[0]), lambda: work("second", failing[1]))
        assert str(caught.value) == ("first" if failing[0] else "second")
        assert getattr(caught.value, "__notes__", []) == [
            "the function beside it failed too: ValueError('second')"
        ] * all(failing)
        assert sorted(ended) == ["first", "second"]
        assert torch.get_num_threads() == 2


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
def test_policy_and_critic_at_once_learn_what_they_learn_one_after_the_other(two_threads):
    rewards = {"length": RewardPartConfig(kind="length", target=4), "model": RewardPartConfig(kind="reward_model")}
    config = replace(LENGTH, prompts=12, max_new_tokens=8, epochs=2, minibatches=2, rewards=rewards)

    def learned(**options: RunBoth) -> Toy:
        made = toy(config, 2, reward_model=True, **options)
        made.run()
        return made

    plain = learned()
    with own_threads(World(rank=0, local_rank=0, size=1, device=CPU)) as run_both:
        at_once, again = learned(run_both=run_both), learned(run_both=run_both)
    for one, other in zip(plain.reports, at_once.reports, strict=True):
        untimed = {name: value for name, value in one.metrics.items() if name.startswith("rlhf/")}
        assert untimed == pytest.approx({name: other.metrics[name] for name in untimed}, abs=1e-5)
    for name, value in tensors_of(at_once).items():
        assert torch.equal(value, tensors_of(again)[name]), name
