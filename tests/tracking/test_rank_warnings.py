"""What the first rank warns of reaches the person at the launcher, once, a line each."""

import logging
from pathlib import Path

from dist_lm.tracking.rank_warnings import WarningFollower, write_warnings


def test_warnings_come_once_in_one_line_and_errors_do_not(tmp_path: Path) -> None:
    path, log = tmp_path / "warnings.log", logging.getLogger("some_package.part")
    path.write_text("of an earlier attempt\n")
    follower = WarningFollower(path)
    write_warnings(path, "some_package")
    assert follower.poll() == []
    log.warning("checkpoint %s is\ndamaged", "step_1")
    log.error("the end")
    log.info("nothing")
    logging.getLogger("another_package").warning("not ours")
    assert follower.poll() == ["checkpoint step_1 is damaged"]
    assert follower.poll() == []
    assert WarningFollower(tmp_path / "none").poll() == []
    logging.getLogger("some_package").handlers.clear()
