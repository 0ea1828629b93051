"""Plays conversations with environments that do what a word of their task says."""

from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Action, Step, Task


async def played(host: Host, how: str) -> Step:
    """Plays a conversation to its end, with `go` as every turn of the model."""
    episode = host.episode(Task.of(how, {"how": how}))
    step = await episode.reset()
    while not step.done:
        step = await episode.step(Action("go"))
    return step
