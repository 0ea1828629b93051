"""The chat page in a real browser, against a server with an untrained model.

Answers that must have a form come from a script instead: `scripted` replaces the stream, not the page.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_lm.chat.documents import read_ranking
from dist_lm.chat.ranking import ranking_tokens
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.rankings import read_local_rankings
from dist_lm.document import Document
from dist_lm.server.door import DoorRules
from tests.patience import patient
from tests.server.conftest import Running, served, served_model, wait_for
from tests.server.test_clients import CLOCK, WEATHER

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install dist_lm[dev]")
pytestmark = pytest.mark.heavy
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEADLINE_MS = patient(60_000)
IDLE = "body:not(:has(.send.stops, [aria-busy=true]))"
CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api.expect.set_options(timeout=DEADLINE_MS)
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=DEADLINE_MS)


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server in a browser of its own, and afterwards finds what it complained about or asked of
    others. Options are those of Playwright's `new_context`."""
    contexts, trouble = [], []

    def opened(url: str, view: str = "", **options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 800}} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((url, "blob:")) else trouble.append(request.url)
        )
        page.goto(f"{url}/{view}")
        return page

    opened.trouble = trouble  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    # A refused request is written to the console by the browser itself.
    assert [line for line in trouble if "Failed to load resource" not in line] == []


def ready(page: Any) -> Any:
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#composer", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant:last-child footer")
    page.wait_for_selector(IDLE)


def set_sampling(page: Any, **values: float) -> None:
    for name, value in values.items():
        page.fill(f"#sampling-{name}", str(value))


def scripted(page: Any, texts: Sequence[str], calls: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Answers chats with `texts`, one after the other, the last one for ever; returns the bodies that are sent."""
    bodies: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        text = texts[min(len(bodies), len(texts)) - 1]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": text}]
        if calls and len(bodies) == 1:
            deltas.append({"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]})
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        finish = "tool_calls" if len(deltas) > 2 else "stop"
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(status=200, content_type="text/event-stream", body=f"{lines}data: [DONE]\n\n")

    page.route(CHAT, answer)
    return bodies


def answering(**response: Any) -> Callable[[Any], None]:
    """Returns a handler of a route that answers with one response."""
    return lambda route: route.fulfill(**response)


def changed(page: Any, **fields: Any) -> None:
    """Adds fields to the requests that the page sends."""

    def send(route: Any) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | fields))

    page.route(CHAT, send)


def test_a_chat_has_the_servers_answer_and_survives_a_reload(open_page, server: Running):
    """Finds text, ids or a seed that are not those of the request, and a tree of turns that a reload forgets."""
    page = ready(open_page(server.url))
    page.fill("#system-prompt", "Be short.")
    set_sampling(page, max_tokens=12, temperature=0.8, top_k=40, seed=5)
    ask(page, "Is it dry?")

    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it dry?"}]
    expected: Any = server.client().chat.completions.create(
        model="small", messages=messages, max_tokens=12, temperature=0.8, seed=5,
        extra_body={"top_k": 40, "return_token_ids": True},
    )  # fmt: skip
    page.locator(".turn.assistant").get_by_role("button", name="Raw").click()
    raw = json.loads(page.locator(".turn.assistant pre").inner_text())
    assert raw["answer"]["content"] == expected.choices[0].message.content
    assert raw["answer"]["token_ids"] == expected.choices[0].token_ids
    assert raw["answer"]["prompt_token_ids"] == expected.prompt_token_ids
    assert raw["answer"]["logprobs"] == pytest.approx(expected.choices[0].raw_logprobs, abs=1e-5)
    assert raw["request"]["seed"] == 5
    assert raw["request"]["messages"] == messages

    page.locator(".turn.assistant").get_by_role("button", name="Tokens").click()
    assert page.locator(".tokens .token").count() == len(expected.choices[0].token_ids)

    # Another answer takes another seed, and stands beside the first one.
    page.locator(".turn.assistant").get_by_role("button", name="Again").click()
    sync_api.expect(page.locator(".turn.assistant .switcher")).to_contain_text("2 / 2")
    page.wait_for_selector(IDLE)
    page.fill("#composer", "a draft")
    ready(page.reload() and page)
    sync_api.expect(page.locator(".turn.assistant .switcher")).to_contain_text("2 / 2")
    assert page.input_value("#composer") == "a draft"
    assert page.input_value("#sampling-top_k") == "40"
    page.get_by_role("button", name="Earlier version").click()
    page.locator(".turn.assistant").get_by_role("button", name="Raw").click()
    raw = json.loads(page.locator(".turn.assistant pre").inner_text())
    assert raw["answer"]["token_ids"] == expected.choices[0].token_ids


def test_turns_are_edited_and_conversations_forked(open_page, server: Running):
    """Finds an edit that loses the earlier turn, asks with the earlier text, or a fork that shares turns."""
    page = ready(open_page(server.url))
    bodies = scripted(page, ["First.", "Second.", "Third."])
    ask(page, "one")
    ask(page, "two")
    page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("other")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".turn.assistant footer")
    page.wait_for_selector(IDLE)
    assert [message["content"] for message in bodies[-1]["messages"]] == ["other"]
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="Earlier version").click()
    assert page.locator(".turn .body-text").all_inner_texts() == ["one", "First.", "two", "Second."]

    page.locator(".turn.assistant").first.get_by_role("button", name="Fork").click()
    assert page.locator(".turn .body-text").all_inner_texts() == ["one", "First."]
    ask(page, "in the fork")
    assert [message["content"] for message in bodies[-1]["messages"]] == ["one", "First.", "in the fork"]
    titles = page.locator("#conversations .title")
    assert titles.all_inner_texts() == ["one (fork)", "one"]
    titles.nth(1).click()
    assert page.locator(".turn .body-text").all_inner_texts() == ["one", "First.", "two", "Second."]

    # An answer that a person has changed is what the model goes on from.
    page.locator(".turn.assistant").last.get_by_role("button", name="Edit").click()
    page.fill(".editor textarea", "Changed.")
    page.get_by_role("button", name="Keep as a new version").click()
    ask(page, "three")
    assert [message["content"] for message in bodies[-1]["messages"]] == ["one", "First.", "two", "Changed.", "three"]


def test_a_stop_frees_the_server(open_page, server: Running):
    """Finds an answer that the server goes on to write for nobody."""
    page = ready(open_page(server.url))
    set_sampling(page, max_tokens=300)
    # The marks that end a turn are forbidden, so that the answer is as long as it may be.
    changed(page, logit_bias={str(token): -100 for token in range(8)})
    page.fill("#composer", "go on")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant .markdown > *")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(".turn.assistant .facts")).to_contain_text("stopped")
    assert wait_for(lambda: server.is_empty)


def test_tools_are_cards_and_results_go_back(open_page, server: Running, tmp_path: Path):
    """Finds calls that the page and the server write differently; the untrained model is made to call."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}  # leaves no token open
    functions = [WEATHER["function"], CLOCK["function"] | {"parameters": nothing}]
    (tmp_path / "tools.json").write_text(json.dumps(functions))
    (tmp_path / "broken.json").write_text('[{"description": "no name"}]')
    page = ready(open_page(server.url))
    page.set_input_files("#tool-file", tmp_path / "broken.json")
    sync_api.expect(page.locator("#settings .error")).to_contain_text("Function 1 has no name")
    page.set_input_files("#tool-file", tmp_path / "tools.json")
    sync_api.expect(page.locator("#settings .tool-card h4")).to_have_text(["weather", "clock"])
    page.locator("#settings .tools select").select_option("=clock")
    page.locator("#settings .check input").uncheck()
    set_sampling(page, max_tokens=120)
    ask(page, "What time is it?")
    assert page.locator(".turn.assistant .tool-card h4").all_inner_texts() == ["clock"]

    page.locator("#settings .tools select").select_option("none")
    page.fill("form.results textarea", '{"time": "14:05"}')
    with page.expect_request(CHAT) as caught:
        page.get_by_role("button", name="Send result").click()
    messages = caught.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[2] == {
        "role": "tool", "tool_call_id": messages[1]["tool_calls"][0]["id"], "content": '{"time": "14:05"}',
    }  # fmt: skip
    page.wait_for_selector(".turn.tool + .turn.assistant footer")
    assert page.locator(".error").count() == 0
    assert page.locator(".turn.tool .tool-card pre").inner_text() == '{"time": "14:05"}'


def test_an_empty_result_and_a_broken_call_are_shown(open_page, server: Running):
    page = ready(open_page(server.url))
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"'}}
    bodies = scripted(page, ["I look.", "Done."], [call])
    ask(page, "What time is it?")
    assert page.locator(".tool-card pre").inner_text() == '{"zone": "CET"'
    page.fill("#composer", "never mind")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#composer-hint")).to_contain_text("wait for their results")
    page.get_by_role("button", name="Send result").click()
    page.wait_for_selector(".turn.tool + .turn.assistant footer")
    assert bodies[-1]["messages"][-1] == {"role": "tool", "tool_call_id": "1", "content": ""}


def test_choices_are_rankings_that_the_stages_read(open_page, server: Running, tmp_path: Path):
    """Finds a file that the reader of stage=reward refuses, or that ranks the worse answer first."""
    page = ready(open_page(server.url, "#compare"))
    page.fill("#compare-system", "Be short.")
    for side, seed in enumerate((1, 2)):
        page.fill(f"#compare-{side}-max_tokens", "12")
        page.fill(f"#compare-{side}-seed", str(seed))
    page.fill("#compare-prompt", "Name a colour.")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="B is better").and_(page.locator(":enabled")).click()
    sync_api.expect(page.locator(".side.better h3")).to_contain_text("Answer B")
    # The conversation goes on from the better answer, and a key chooses.
    page.fill("#compare-prompt", "Another one?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".choose:enabled")
    page.locator("body").click(position={"x": 640, "y": 300})
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("a")
    sync_api.expect(page.locator(".choices")).to_contain_text("2 choices kept")
    ready(page.reload() and page)
    with page.expect_download() as caught:
        page.get_by_role("button", name="Save as .jsonl").click()
    file = tmp_path / "rankings.jsonl"
    caught.value.save_as(file)

    def answer(messages: Any, seed: int) -> str:
        options: Any = {"model": "small", "messages": messages, "max_tokens": 12, "seed": seed}
        return server.client().chat.completions.create(**options).choices[0].message.content or ""

    source = SourceConfig(reader="rankings", language="ours", dataset=str(file), licence="own")
    documents = [*read_local_rankings(source, seed=0)]
    first, second = (read_ranking(document.text) for document in documents if isinstance(document, Document))
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Name a colour."}]
    assert first.completions == (answer(messages, 1), answer(messages, 2))
    assert first.ranks == (1, 0)
    assert [(turn.role, turn.content) for turn in first.prompt.messages] == [tuple(m.values()) for m in messages]
    assert second.ranks == (0, 1)
    assert [turn.content for turn in second.prompt.messages[1:]] == [
        "Name a colour.", first.completions[1], "Another one?",
    ]  # fmt: skip
    assert len(ranking_tokens(second, server.loaded.tokenizer).tokens)


def test_two_models_are_asked_side_by_side(open_page, model, loaded):
    """Finds a side that asks another model than the one that is chosen for it."""
    others = [served_model(loaded, "other")]
    with served(model, loaded, DoorRules("127.0.0.1"), others=others) as running:
        page = ready(open_page(running.url, "#compare"))
        page.select_option("#compare-model-1", "other")
        for side in (0, 1):
            page.fill(f"#compare-{side}-max_tokens", "6")
        page.fill("#compare-prompt", "Name a colour.")
        # The page lets go of a stream at its last line, after which the browser calls the request finished or failed:
        # the test waits for the request, not for its end.
        with page.expect_request(lambda request: '"model":"other"' in (request.post_data or "")):
            page.keyboard.press("Enter")
        page.wait_for_selector(IDLE)
        assert [text.split(" · ")[1] for text in page.locator(".side h3").all_inner_texts()] == ["small", "other"]
        page.context.close()


def test_answers_without_a_difference_cannot_be_ranked(open_page, server: Running):
    """Finds a line that the reader would stop at: equal texts, an empty one, one that was cut off by an error."""
    page = ready(open_page(server.url, "#compare"))
    scripted(page, ["Same.", "Same.", "", "Other."])
    for words in ("The answers are equal", "An answer is empty"):
        page.fill("#compare-prompt", "Name a colour.")
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".compare .notice")).to_contain_text(words)
        assert page.locator(".choose:enabled").count() == 0
    assert "kept" not in page.locator(".choices").inner_text()


def test_names_are_hidden_until_the_choice(open_page, server: Running):
    page = ready(open_page(server.url, "#compare"))
    scripted(page, ["Blue.", "Red."])
    page.get_by_label("hide who is who").check()
    page.fill("#compare-prompt", "Name a colour.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".choose:enabled")
    assert "small" not in page.locator(".side h3").all_inner_texts()[0]
    page.get_by_role("button", name="A is better").click()
    sync_api.expect(page.locator(".side.better h3")).to_contain_text("small")


def test_the_middle_is_the_servers(open_page, server: Running):
    """Finds a prefix or suffix that is not what the fields hold."""
    page = ready(open_page(server.url, "#infill"))
    set_sampling(page, max_tokens=10, seed=3)
    page.fill("#infill-prefix", "def f():\n    ")
    page.fill("#infill-suffix", "\n    return x\n")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Take it").wait_for()
    expected = server.client().completions.create(
        model="small", prompt="def f():\n    ", suffix="\n    return x\n", max_tokens=10, seed=3
    )
    assert page.locator(".middle pre").text_content() == expected.choices[0].text
    page.get_by_role("button", name="Tokens").click()
    assert page.locator(".tokens .token").count() <= 10
    page.get_by_role("button", name="Take it").click()
    assert page.input_value("#infill-prefix") == "def f():\n    " + expected.choices[0].text


def test_the_key_is_asked_for_and_stays_in_the_tab(open_page, model, loaded):
    """Finds a key in the storage that outlives the tab, and a page that cannot be opened without one."""
    with served(model, loaded, DoorRules("127.0.0.1", key="secret")) as running:
        page = open_page(running.url)
        for key in ("guess", "secret"):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        ready(page)
        set_sampling(page, max_tokens=3)
        ask(page, "Hello")
        assert page.locator(".error").count() == 0
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        ready(page.reload() and page)
        sync_api.expect(page.locator("#open-key")).to_be_visible()
        page.click("#open-key")
        page.get_by_role("button", name="Forget it").click()
        page.wait_for_selector("#key-dialog[open] #key")
        assert page.evaluate("sessionStorage.length") == 0
        page.context.close()


def test_models_that_come_late_disturb_no_writer(open_page, server: Running):
    """Finds a redraw that takes the focus or the place in the text: what is typed next, and Enter, would go astray."""
    page = ready(open_page(server.url))
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    page.fill("#composer", "Hel!")
    page.keyboard.press("ArrowLeft")
    held.pop().continue_()
    ready(page)
    page.keyboard.type("lo")
    assert page.input_value("#composer") == "Hello!"
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant:last-child footer")


def test_errors_are_told_in_words(open_page, server: Running):
    """Finds an error that leaves an answer growing for ever, or says nothing that a reader understands."""
    page = ready(open_page(server.url))
    refusals = [
        (429, {"Retry-After": "3"}, {"error": {"message": "256 requests are under way"}}, "busy.*in 3 s"),
        (400, {}, {"error": {"message": "top_p=2: expected 0 to 1"}}, "refused: top_p=2"),
        (502, {}, "a page of a proxy", "502"),
    ]
    for status, headers, body, words in refusals:
        content = json.dumps(body) if isinstance(body, dict) else body
        page.unroute(CHAT)
        page.route(CHAT, answering(status=status, headers=headers, body=content))
        page.click("#conversations .new")
        page.fill("#composer", "Hello")
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".turn .error")).to_contain_text(re.compile(words))

    # A stream that breaks off keeps what has come; a server that is gone says so, and another try helps.
    page.unroute(CHAT)
    event = json.dumps({"choices": [{"index": 0, "delta": {"content": "Half"}}]})
    page.route(CHAT, answering(content_type="text/event-stream", body=f"data: {event}\n\n"))
    page.get_by_role("button", name="Try again").click()
    sync_api.expect(page.locator(".turn .error")).to_contain_text("ended before the answer was complete")
    assert page.locator(".turn.assistant .markdown").inner_text() == "Half"
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    sync_api.expect(page.locator(".turn .error")).to_contain_text("still running")
    page.unroute(CHAT)
    scripted(page, ["Whole."])
    page.get_by_role("button", name="Try again").click()
    sync_api.expect(page.locator(".turn.assistant .markdown")).to_have_text("Whole.")


HOSTILE = """<img src=x onerror=alert(1)> <script>alert(1)</script> [press](javascript:alert(1))
[data](data:text/html,x)
[site](https://example.org/a?b=c) https://example.net/x. **<b>bold</b>** `<i>`

```html
<script>alert(1)</script>
```
"""


def test_text_of_a_model_is_never_html(open_page, server: Running):
    """Finds an element, a script or a link that the text of an answer, a title or a result makes."""
    page = ready(open_page(server.url))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    scripted(page, [HOSTILE])
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("main img, main script, main b, main i").count() == 0
    links = page.locator(".markdown a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/a?b=c",
        "https://example.net/x",
    ]
    assert all("noopener" in (link.get_attribute("rel") or "") for link in links.all())
    assert page.locator(".markdown strong").inner_text() == "<b>bold</b>"
    assert page.locator(".markdown figure pre").inner_text() == "<script>alert(1)</script>"


def test_markdown_has_its_blocks(open_page, server: Running):
    """Finds text that gets lost, and marks that are taken for emphasis inside a name or a product."""
    page = ready(open_page(server.url))
    draw = """async (text) => {
      const {drawMarkdown} = await import("/page/markdown.js");
      const box = document.createElement("div");
      // Grown piece by piece, as a stream is: the end must be the same as at once.
      for (let end = 1; end <= text.length; end++) drawMarkdown(box, text.slice(0, end));
      const whole = document.createElement("div");
      drawMarkdown(whole, text);
      if (!box.isEqualNode(whole)) throw new Error("a grown text is drawn in another way");
      const outline = (node) => node.nodeType === 3 ? node.data :
        `<${node.localName}>${[...node.childNodes].map(outline).join("")}</${node.localName}>`;
      whole.querySelectorAll("figcaption").forEach((caption) => caption.remove());
      return [...whole.childNodes].map(outline).join("");
    }"""
    for text, expected in {
        "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
        "**bold** *it* _it_ snake_case_name 2 * 3 * 4": (
            "<p><strong>bold</strong> <em>it</em> <em>it</em> snake_case_name 2 * 3 * 4</p>"
        ),
        "`a*b*` ``c`d``": "<p><code>a*b*</code> <code>c`d</code></p>",
        "- a\n- b\n  1. c\n  2. d\n- e": ("<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol></li><li>e</li></ul>"),
        "3. a\n4. b": "<ol><li>a</li><li>b</li></ol>",
        "# T\ntext\n> q\n\n---": "<h3>T</h3><p>text</p><blockquote><p>q</p></blockquote><hr></hr>",
        "```py\nx = 1\n\ny": "<figure><pre><code>x = 1\n\ny</code></pre></figure>",
        "**never closed": "<p>**never closed</p>",
        "\\*plain\\*": "<p>*plain*</p>",
    }.items():
        assert page.evaluate(draw, text) == expected
    # Long runs of marks are read in time.
    for mark in ("*", "_", "`", "[", "> ", "- ", "**a ", "[a]("):
        assert page.evaluate(draw.replace("for (let end = 1;", "for (let end = text.length;"), mark * 3000)


def test_alternatives_are_shown_on_demand(open_page, server: Running):
    """Finds a probability that is not e to the log-probability, a line break or a part of a character that is lost."""
    page = ready(open_page(server.url))
    tokens = [
        ("Hi", b"Hi", -0.1),
        ("\n", b"\n", -2.0),
        ("\ufffd", "é".encode()[:1], -4.0),
        ("\ufffd", "é".encode()[1:], 0.0),
    ]
    entries = [
        {
            "token": text,
            "bytes": [*content],
            "logprob": logprob,
            "top_logprobs": [{"token": text, "logprob": logprob}, {"token": "Ho", "logprob": -3.0}],
        }
        for text, content, logprob in tokens
    ]
    choice = {"index": 0, "delta": {"content": "Hi\né"}, "logprobs": {"content": entries}, "finish_reason": "stop"}

    def answer(route: Any) -> None:
        assert route.request.post_data_json["top_logprobs"] == 5
        event = json.dumps({"choices": [choice]})
        route.fulfill(content_type="text/event-stream", body=f"data: {event}\n\ndata: [DONE]\n\n")

    page.route(CHAT, answer)
    ask(page, "Hello")
    page.locator(".turn.assistant").get_by_role("button", name="Tokens").click()
    assert page.locator(".tokens .token").all_inner_texts() == ["Hi", "↵\n", "…", "é"]
    page.locator(".tokens .token").first.click()
    assert page.locator(".alternatives li").all_inner_texts()[0].split() == ["Hi", "90.5", "%", "chosen"]
    assert page.locator(".alternatives li").all_inner_texts()[1].split() == ["Ho", "5", "%"]
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator(".token-detail")).to_contain_text("Token 2 of 4")
    sync_api.expect(page.locator(".alternatives .chosen")).to_contain_text("13.5 %")


def test_answers_are_heard_and_the_focus_stays(open_page, server: Running):
    """Finds an answer that a screen reader is not told of, and a press that sends the focus to the top of the page."""
    page = ready(open_page(server.url))
    scripted(page, ["First answer.", "Second answer."])
    ask(page, "Hello")
    sync_api.expect(page.locator("#live")).to_have_text("Answer: First answer.")
    page.locator(".turn.assistant").get_by_role("button", name="Again").press("Enter")
    sync_api.expect(page.locator("#live")).to_have_text("Answer: Second answer.")
    assert page.evaluate("document.activeElement.matches('.turn.assistant')")
    page.get_by_role("button", name="Earlier version").press("Enter")
    sync_api.expect(page.locator("#live")).to_have_text("Version 1 of 2")
    page.wait_for_selector(".switcher button:focus, .turn:focus")


def test_a_chosen_scheme_stays(open_page, server: Running):
    page = ready(open_page(server.url, color_scheme="light"))
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60"
    assert not page.evaluate(dark)
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(dark)
    ready(page.reload() and page)
    assert page.evaluate(dark)
    assert page.get_by_role("button", name="Light colours").is_visible()


def test_storage_is_bounded_and_forgets_the_oldest(open_page, server: Running):
    """Finds a page that stops to keep conversations once the browser's space is full."""
    page = ready(open_page(server.url))
    keys = page.evaluate(
        """async () => {
          const {saveConversation} = await import("/page/store.js");
          const {addTurn, newConversation} = await import("/page/tree.js");
          for (let number = 0; number < 130; number++) {
            const conversation = newConversation();
            const asked = addTurn(conversation, null, {role: "user", content: `${number} ` + "x".repeat(30000)});
            addTurn(conversation, asked.id, {role: "assistant", content: "y", tokens: "z".repeat(30000)});
            conversation.updated = number;
            if (!saveConversation(conversation)) throw new Error("not kept");
          }
          return Object.values(localStorage).filter((value) => value.includes("turns")).map((value) => {
            const {updated, turns} = JSON.parse(value);
            return [updated, value.length, Object.values(turns).some((turn) => turn.tokens)];
          });
        }"""
    )
    numbers = sorted(number for number, _, _ in keys)
    assert numbers[-1] == 129
    assert len(numbers) == numbers[-1] - numbers[0] + 1, "one in the middle is forgotten"
    assert sum(length for _, length, _ in keys) <= 3_100_000
    assert [has_tokens for number, _, has_tokens in keys if number == 129] == [True]


def test_all_is_reached_by_keys(open_page, server: Running):
    """Finds a shortcut that does nothing, or that fires while somebody types."""
    page = ready(open_page(server.url))
    scripted(page, ["First.", "Second."])
    page.keyboard.press("/")
    page.keyboard.type("hjkr?")
    assert page.input_value("#composer") == "hjkr?"
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant footer")
    page.wait_for_selector(IDLE)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("r")
    sync_api.expect(page.locator(".switcher")).to_contain_text("2 / 2")
    page.wait_for_selector(IDLE)
    page.keyboard.press("[")
    sync_api.expect(page.locator(".switcher")).to_contain_text("1 / 2")
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.matches('.turn.user')")
    page.keyboard.press("e")
    page.wait_for_selector(".editor textarea:focus")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help-dialog[open]")
    assert page.locator("#help-dialog kbd").count() > 15
    page.keyboard.press("Escape")
    for key, view in (("2", "compare"), ("3", "infill"), ("1", "chat")):
        page.keyboard.press(key)
        page.wait_for_selector(f"body[data-view={view}]")
    page.keyboard.press("n")
    page.wait_for_selector(".welcome")
    page.wait_for_selector("#composer:focus")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.bars),
        pytest.param(390, "light", marks=pytest.mark.bars),
    ],
)
def test_every_view_fits_and_can_be_read(open_page, server: Running, tmp_path: Path, width: int, scheme: str):
    """Finds a view wider than the screen, and what axe finds: weak contrast, a control without a name, a wrong role."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe is not there: pip install dist_lm[dev]")
    program = next(Path(axe.__file__).parent.glob("*.js")).read_text()
    page = ready(open_page(server.url, viewport={"width": width, "height": 844}, color_scheme=scheme))
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    scripted(page, [HOSTILE, "Second.", "Third."], [call])

    def check(where: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
        page.evaluate(program)
        violations = page.evaluate("axe.run().then((result) => result.violations)")
        assert not [(where, fault["id"], fault["nodes"][0]["html"]) for fault in violations]

    check("empty")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 127")
    assert light == (scheme == "light")
    ask(page, "What time is it?")
    check("calls")
    page.click("form.results button")
    page.wait_for_selector(".turn.tool + .turn.assistant footer")
    check("chat")
    page.unroute(CHAT)
    changed(page, seed=5, max_tokens=12)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("n")
    ask(page, "Hello")
    page.locator(".turn.assistant").get_by_role("button", name="Tokens").click()
    page.locator(".tokens .token").nth(1).click()
    check("tokens")
    page.locator(".turn.assistant").get_by_role("button", name="Raw").click()
    check("raw")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    check("keys")
    page.keyboard.press("Escape")
    page.unroute(CHAT)
    scripted(page, ["Blue.", "Red."])
    page.goto(f"{server.url}/#compare")
    check("settings of a comparison")
    page.fill("#compare-prompt", "Name a colour.")
    page.keyboard.press("Enter")
    page.locator(".choose:enabled").first.click()
    check("comparison")
    page.goto(f"{server.url}/#infill")
    check("infill")
