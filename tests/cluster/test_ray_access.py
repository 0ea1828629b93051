"""What an agent hands to a rank that may join Ray: enough to get in, and nothing to any other rank."""

import json

from dist_lm.cluster.ray_cluster import RANK_ACCESS, RayAccess, access_variables, own_access


def test_a_rank_reads_what_its_agent_wrote():
    environ = access_variables({"RAY_AUTH_TOKEN_PATH": "/run/token", "HOME": "/root"}, "10.0.0.1:6379", ["10.0.0.1"])
    assert environ.keys() == {RANK_ACCESS}
    assert own_access(environ) == RayAccess("10.0.0.1:6379", "/run/token", None, ("10.0.0.1",))
    assert own_access({"HOME": "/root"}) is None


def test_a_token_itself_is_handed_over_only_where_there_is_no_file():
    both = {"RAY_AUTH_TOKEN_PATH": "/run/token", "RAY_AUTH_TOKEN": "sesame"}
    assert "sesame" not in json.dumps(access_variables(both, "a:1", []))
    access = own_access(access_variables({"RAY_AUTH_TOKEN": "sesame"}, "a:1", []))
    assert access is not None
    assert (access.token_path, access.token) == (None, "sesame")
