"""instructor, unmodified: its requests are answered with values of the type that they ask for.

Its releases want an older rich than ours, so no extra installs it: `pip install --no-deps instructor` does.
"""

from typing import Any

import openai
import pytest

from tests.server.test_typed_clients import ASKED, Person

instructor: Any = pytest.importorskip("instructor")
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_instructor_gets_a_person(client: openai.OpenAI, mode: Any):
    """Finds a field of its requests that the server refuses, and an answer that is no value of the type."""
    people = instructor.from_openai(client, mode=mode)
    person, response = people.chat.completions.create_with_completion(
        model="small", response_model=Person, messages=ASKED, max_tokens=120, max_retries=0, seed=1
    )
    assert isinstance(person, Person)
    assert response.usage.completion_tokens


def test_instructor_streams_parts_of_a_person(client: openai.OpenAI):
    people = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(
        people.chat.completions.create_partial(
            model="small", response_model=Person, messages=ASKED, max_tokens=120, max_retries=0, seed=1
        )
    )
    assert len(parts) > 1
    assert Person.model_validate(parts[-1].model_dump())
