// Draws one turn of a conversation. What its buttons do is the business of `actions`, which the chat view has.

import {factsOf} from "./answer.js";
import {button, copyText, element, errorBox, grow} from "./dom.js";
import {codeBlock, drawMarkdown} from "./markdown.js";
import {tokenView} from "./tokens.js";
import {callCard, resultCard} from "./tools.js";
import {messagesOf, siblingsOf, turnsUpTo} from "./tree.js";

const NAMES = {user: "You", assistant: "Assistant", tool: "Results"};
const MODES = [["text", "Text"], ["tokens", "Tokens"], ["raw", "Raw"]];
const LIST_OF_NUMBERS = /\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]/g;

/**
 * Returns the node of a turn.
 *
 * @param {object} turn
 * @param {object} state {conversation, mode: how an answer is shown, isRunning, isEdited, isLast, contextLength}
 * @param {object} actions functions of a turn: step, show, edit, keepEdit, cancelEdit, regenerate, fork, sendResults,
 *   askKey
 */
export function turnNode(turn, state, actions) {
  const siblings = siblingsOf(state.conversation, turn);
  const place = siblings.indexOf(turn) + 1;
  const name = NAMES[turn.role];
  const isWaiting = state.isLast && turn.calls?.length && !state.isRunning;
  return element(
    "article",
    {
      class: `turn ${turn.role}`,
      tabindex: "-1",
      "data-turn": turn.id,
      "data-focus": `turn-${turn.id}`,
      "aria-label": siblings.length > 1 ? `${name}, version ${place} of ${siblings.length}` : name,
      "aria-busy": state.isRunning ? "true" : null,
    },
    element(
      "header",
      {},
      element("h3", {}, name),
      siblings.length > 1 ? switcher(turn, siblings, place, actions) : null,
      turn.role === "assistant" ? modeSwitch(turn, state.mode, actions) : null,
    ),
    state.isEdited ? editor(turn, actions) : body(turn, state),
    turn.error ? errorBox(turn.error, ...remedies(turn, actions)) : null,
    state.isRunning || state.isEdited ? null : footer(turn, state, actions),
    isWaiting ? resultForm(turn, actions) : null,
  );
}

function switcher(turn, siblings, place, actions) {
  const step = (words, iconName, by) =>
    button(words, iconName, () => actions.step(turn, by), {
      quiet: true,
      class: "icon-button small",
      key: `step${by}-${turn.parent}`,
      disabled: !siblings[place - 1 + by],
    });
  return element(
    "span",
    {class: "switcher"},
    step("Earlier version", "left", -1),
    element("span", {}, `${place} / ${siblings.length}`),
    step("Later version", "right", 1),
  );
}

function modeSwitch(turn, mode, actions) {
  const buttons = MODES.map(([name, words]) =>
    element(
      "button",
      {
        type: "button",
        "aria-pressed": String(name === mode),
        "data-focus": `mode-${name}-${turn.id}`,
        onclick: () => actions.show(turn, name),
      },
      words,
    ),
  );
  return element("span", {class: "switch", role: "group", "aria-label": "Shown as"}, ...buttons);
}

// Content

function body(turn, state) {
  const node = element("div", {class: "body-text"});
  if (turn.role === "user") node.append(element("p", {class: "plain"}, turn.content));
  else if (turn.role === "tool") node.append(resultCards(turn, state.conversation));
  else if (state.mode === "tokens") node.append(tokenView(turn.tokens));
  else if (state.mode === "raw") node.append(codeBlock(rawOf(turn, state.conversation), "json"));
  else drawAnswer(node, turn, state.isRunning);
  return node;
}

/** Draws text and calls of an answer into its node, which keeps what did not change since it was drawn last. */
export function drawAnswer(node, turn, isRunning) {
  if (!node.markdown) {
    node.markdown = element("div", {class: "markdown"});
    node.calls = element("div", {class: "calls"});
    node.replaceChildren(node.markdown, node.calls);
  }
  node.classList.toggle("writing", isRunning);
  drawMarkdown(node.markdown, turn.content);

  const cards = (turn.calls ?? []).map(callCard);
  const isEmpty = !isRunning && !turn.content && !cards.length && !turn.error;
  node.calls.replaceChildren(...(isEmpty ? [element("p", {class: "muted"}, "(an empty answer)")] : cards));
}

function resultCards(turn, conversation) {
  const calls = conversation.turns[turn.parent]?.calls ?? [];
  const nameOf = (id) => calls.find((call) => call.id === id)?.name ?? "";
  return element("div", {class: "calls"}, ...turn.results.map(({id, content}) => resultCard(nameOf(id), content)));
}

/** Returns request and answer of a turn as JSON. */
function rawOf(turn, conversation) {
  const before = turnsUpTo(conversation, conversation.turns[turn.parent]);
  const request = {
    ...turn.request,
    messages: messagesOf(conversation.system, before),
    tools: conversation.tools.length ? conversation.tools : undefined,
  };
  const answer = {
    content: turn.content,
    tool_calls: turn.calls,
    finish_reason: turn.finish,
    usage: turn.usage,
    weights_version: turn.version,
    remembered_tokens: turn.remembered,
    prompt_token_ids: turn.promptIds,
    token_ids: turn.ids,
    logprobs: turn.tokens?.map((token) => token.logprob),
  };

  // A list of numbers takes one line instead of one for each number.
  const text = JSON.stringify({request, answer}, null, 2);
  return text.replace(LIST_OF_NUMBERS, (_, numbers) => `[${numbers.replace(/\s+/g, " ")}]`);
}

/** Returns what is copied of a turn. */
export function textOf(turn) {
  if (turn.role === "tool") return turn.results.map((result) => result.content).join("\n");
  const calls = (turn.calls ?? []).map((call) => `${call.name}(${call.arguments})`);
  return [turn.content, ...calls].filter(Boolean).join("\n");
}

// Below the content

function footer(turn, state, actions) {
  const isAnswer = turn.role === "assistant";
  const edit = button("Edit", "edit", () => actions.edit(turn), {key: `edit-${turn.id}`});
  const again = button("Again", "again", () => actions.regenerate(turn), {
    key: `again-${turn.id}`,
    title: "Ask for another answer",
  });
  const copy = button("Copy", "copy", () => copyText(textOf(turn)), {key: `copy-${turn.id}`});
  const fork = button("Fork", "fork", () => actions.fork(turn), {
    key: `fork-${turn.id}`,
    title: "Begin another conversation with the turns up to here",
  });
  const facts = isAnswer && turn.model ? factsOf(turn, state.contextLength).join(" · ") : "";
  return element(
    "footer",
    {},
    element("span", {class: "actions"}, turn.role === "tool" ? null : edit, isAnswer ? again : null, copy, fork),
    facts ? element("span", {class: "facts"}, facts) : null,
  );
}

function remedies(turn, actions) {
  const again = button("Try again", "again", () => actions.regenerate(turn));
  return turn.status === 401 ? [button("Give the key", "key", () => actions.askKey()), again] : [again];
}

function editor(turn, actions) {
  const area = element("textarea", {value: turn.content, "aria-label": "Text of the turn", oninput: () => grow(area)});
  area.addEventListener("keydown", (event) => {
    const isDone = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (event.key !== "Escape" && !isDone) return;
    event.preventDefault();
    if (isDone) actions.keepEdit(turn, area.value);
    else actions.cancelEdit(turn);
  });
  requestAnimationFrame(() => grow(area));

  const words = turn.role === "user" ? "Send as a new version" : "Keep as a new version";
  const keep = button(words, "check", () => actions.keepEdit(turn, area.value), {class: "primary"});
  const cancel = button("Cancel", null, () => actions.cancelEdit(turn));
  return element("div", {class: "editor"}, area, element("div", {class: "row"}, keep, cancel));
}

function resultForm(turn, actions) {
  const areas = turn.calls.map((call, index) =>
    element("textarea", {rows: 2, id: `result-${turn.id}-${index}`, placeholder: "Text or JSON; may stay empty"}),
  );
  const fields = turn.calls.map((call, index) =>
    element("div", {}, element("label", {for: areas[index].id}, `Result of ${call.name}`), areas[index]),
  );
  const send = (event) => {
    event.preventDefault();
    const results = turn.calls.map((call, index) => ({id: call.id, content: areas[index].value}));
    actions.sendResults(turn, results);
  };
  const words = turn.calls.length > 1 ? "Send results" : "Send result";
  return element(
    "form",
    {class: "results", onsubmit: send},
    ...fields,
    element("button", {type: "submit", class: "primary"}, words),
  );
}
