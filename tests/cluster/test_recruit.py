"""Which nodes of those looked at are left out."""

from dist_lm.cluster.inspection import Inspection
from dist_lm.cluster.recruit import sift

FOUND = Inspection(("a", "b", "c", "d"), unfit={0: "its clock is off"}, slow={0: "sends 1", 2: "sends 2"}, rates=())


def test_slow_nodes_are_left_out_only_where_others_could_come():
    assert sift(FOUND, spare=2, tolerated=()) == ({0: "its clock is off", 2: "sends 2"}, {})
    assert sift(FOUND, spare=1, tolerated=()) == ({0: "its clock is off"}, {2: "sends 2"})


def test_an_unfit_node_is_left_out_whether_there_are_others_or_not():
    assert sift(FOUND, spare=0, tolerated=())[0] == {0: "its clock is off"}


def test_a_slow_node_whose_replacement_was_busy_is_kept():
    assert sift(FOUND, spare=3, tolerated={2}) == ({0: "its clock is off"}, {2: "sends 2"})
