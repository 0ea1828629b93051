// The view of a conversation: its turns, what can be done with each, and the field for the next one.

import {factsOf, newAnswer, samplingOf, isNumber, streamChat} from "./answer.js";
import {announce, button, copyText, element, errorBox, grow, redraw} from "./dom.js";
import {codeBlock, drawMarkdown} from "./markdown.js";
import {toolFields} from "./settings.js";
import {tokenView} from "./tokens.js";
import {callCard, resultCard} from "./tools.js";
import {addTurn, choose, forked, messagesOf, removeTurn, shownTurns, siblingsOf, turnsUpTo} from "./tree.js";

const NAMES = {user: "You", assistant: "Assistant", tool: "Results"};
const MODES = [["text", "Text"], ["tokens", "Tokens"], ["raw", "Raw"]];
const NEAR_END = 80; // pixels: who is that near to the end follows the answer

export class ChatView {
  constructor(app) {
    this._app = app;
    this._modes = {}; // by id of a turn: how its answer is shown
    this._editing = null; // id of a turn
    this._running = null; // {turn, controller}
    this._bodies = new Map(); // by id of a turn: the node its text is drawn into
  }

  get isRunning() {
    return this._running !== null;
  }

  get _conversation() {
    return this._app.conversation;
  }

  /** Draws the whole view. */
  draw(container) {
    this._turns = element("div", {class: "turns", role: "region", "aria-label": "Conversation", tabindex: "0", "data-focus": "turns"});
    this._hint = element("p", {class: "hint", id: "composer-hint"});
    this._field = element("textarea", {
      id: "composer",
      rows: 1,
      placeholder: "Write a message",
      "aria-label": "Message",
      "aria-describedby": "composer-hint",
      value: this._app.draft,
      oninput: () => {
        grow(this._field);
        this._app.draft = this._field.value;
      },
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        this.send();
      },
    });
    this._button = element("button", {type: "submit", class: "send"});
    const composer = element("form", {class: "composer", onsubmit: (event) => {
      event.preventDefault();
      if (this.isRunning) this.stop();
      else this.send();
    }}, this._field, this._button);
    container.replaceChildren(element("h2", {class: "only-heard"}, "Chat"), this._turns, element("div", {class: "foot"}, composer, this._hint));
    this._drawTurns();
    this._drawButton();
    grow(this._field);
    this._toEnd();
  }

  /** Draws the turns again, and keeps focus and place. */
  _drawTurns() {
    if (!this._turns?.isConnected) return;
    const place = this._turns.scrollTop;
    const hadFocus = this._turns.contains(document.activeElement);
    redraw(this._turns, () => {
      this._bodies.clear();
      const turns = shownTurns(this._conversation);
      const nodes = turns.map((turn, index) => this._turnNode(turn, index === turns.length - 1));
      const {system} = this._conversation;
      if (system.trim() && turns.length) nodes.unshift(element("p", {class: "system"}, element("span", {class: "label"}, "System prompt"), system));
      this._turns.replaceChildren(...(nodes.length ? nodes : [this._welcome()]));
    });
    // What had the focus may be gone, such as the form of a result: the answer that it led to has it now.
    if (hadFocus && !this._turns.contains(document.activeElement)) this._turns.querySelector(".turn:last-of-type")?.focus();
    this._turns.scrollTop = place;
    this._app.conversationChanged();
  }

  _welcome() {
    const {tools} = this._conversation;
    return element(
      "div",
      {class: "welcome"},
      element("p", {class: "big"}, "Talk to ", element("b", {}, this._app.settings.model || "the model")),
      element("p", {class: "muted"}, "Enter sends, Shift+Enter begins a line. Edit a turn, ask again, or fork from any point: nothing gets lost."),
      tools.length ? element("p", {class: "muted"}, `The model can call ${tools.length} tool${tools.length === 1 ? "" : "s"}.`) : null,
    );
  }

  _drawButton() {
    const words = this.isRunning ? "Stop" : "Send";
    this._button.replaceChildren(...button(words, words.toLowerCase(), () => {}).childNodes);
    this._button.classList.toggle("stops", this.isRunning);
  }

  // Turns

  _turnNode(turn, isLast) {
    const isRunning = this._running?.turn === turn;
    const siblings = siblingsOf(this._conversation, turn);
    const place = siblings.indexOf(turn) + 1;
    const name = NAMES[turn.role];
    return element(
      "article",
      {
        class: `turn ${turn.role}`,
        tabindex: "-1",
        "data-turn": turn.id,
        "data-focus": `turn-${turn.id}`,
        "aria-label": siblings.length > 1 ? `${name}, version ${place} of ${siblings.length}` : name,
        "aria-busy": isRunning ? "true" : null,
      },
      element("header", {}, element("h3", {}, name), this._switcher(turn, siblings, place), this._modeSwitch(turn)),
      this._editing === turn.id ? this._editor(turn) : this._body(turn, isRunning),
      turn.error ? errorBox(turn.error, ...this._remedies(turn)) : null,
      isRunning || this._editing === turn.id ? null : this._footer(turn),
      isLast && turn.calls?.length && !isRunning ? this._resultForm(turn) : null,
    );
  }

  _switcher(turn, siblings, place) {
    if (siblings.length < 2) return null;
    const step = (words, iconName, by) =>
      button(words, iconName, () => this._step(turn, by), {
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

  _step(turn, by) {
    const siblings = siblingsOf(this._conversation, turn);
    const next = siblings[siblings.indexOf(turn) + by];
    if (!next) return;
    choose(this._conversation, next);
    this._app.saveConversation(this._conversation);
    this._drawTurns();
    announce(`Version ${siblings.indexOf(next) + 1} of ${siblings.length}`);
  }

  _modeSwitch(turn) {
    if (turn.role !== "assistant") return null;
    const mode = this._modes[turn.id] ?? "text";
    const buttons = MODES.map(([name, words]) =>
      element("button", {
        type: "button",
        "aria-pressed": String(name === mode),
        "data-focus": `mode-${name}-${turn.id}`,
        onclick: () => this._show(turn, name),
      }, words),
    );
    return element("span", {class: "switch", role: "group", "aria-label": "Shown as"}, ...buttons);
  }

  _show(turn, mode) {
    this._modes[turn.id] = mode;
    this._drawTurns();
  }

  _body(turn, isRunning) {
    const body = element("div", {class: "body-text"});
    this._bodies.set(turn.id, body);
    this._fill(body, turn, isRunning);
    return body;
  }

  /** Draws the content of a turn into its node. */
  _fill(body, turn, isRunning) {
    const mode = this._modes[turn.id] ?? "text";
    if (turn.role === "user") {
      body.replaceChildren(element("p", {class: "plain"}, turn.content));
    } else if (turn.role === "tool") {
      const calls = this._conversation.turns[turn.parent]?.calls ?? [];
      const nameOf = (id) => calls.find((call) => call.id === id)?.name ?? "";
      body.replaceChildren(element("div", {class: "calls"}, ...turn.results.map(({id, content}) => resultCard(nameOf(id), content))));
    } else if (mode === "tokens") {
      body.replaceChildren(tokenView(turn.tokens));
    } else if (mode === "raw") {
      body.replaceChildren(codeBlock(this._raw(turn), "json"));
    } else {
      this._fillAnswer(body, turn, isRunning);
    }
  }

  _fillAnswer(body, turn, isRunning) {
    if (!body.markdown) {
      body.markdown = element("div", {class: "markdown"});
      body.calls = element("div", {class: "calls"});
      body.replaceChildren(body.markdown, body.calls);
    }
    drawMarkdown(body.markdown, turn.content);
    body.calls.replaceChildren(...(turn.calls ?? []).map((call) => callCard(call)));
    body.classList.toggle("writing", isRunning);
    if (!isRunning && !turn.content && !turn.calls?.length && !turn.error) {
      body.calls.replaceChildren(element("p", {class: "muted"}, "(an empty answer)"));
    }
  }

  /** Returns request and answer of a turn as JSON. */
  _raw(turn) {
    const {request, content, calls, promptIds, ids, tokens, finish, usage, version, remembered} = turn;
    const before = turnsUpTo(this._conversation, this._conversation.turns[turn.parent]);
    const {tools} = toolFields(this._conversation);
    const logprobs = tokens?.map((token) => token.logprob);
    const answer = {content, tool_calls: calls, finish_reason: finish, usage, weights_version: version,
      remembered_tokens: remembered, prompt_token_ids: promptIds, token_ids: ids, logprobs};
    const asked = {...request, messages: messagesOf(this._conversation.system, before), tools};
    const text = JSON.stringify({request: asked, answer}, null, 2);
    // Lists of numbers take one line instead of one for each number.
    return text.replace(/\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]/g, (_, numbers) => `[${numbers.replace(/\s+/g, " ")}]`);
  }

  _footer(turn) {
    const actions = [
      button("Edit", "edit", () => this._edit(turn), {key: `edit-${turn.id}`}),
      turn.role === "assistant" ? button("Again", "again", () => this.regenerate(turn), {key: `again-${turn.id}`, title: "Ask for another answer"}) : null,
      button("Copy", "copy", () => copyText(textOf(turn)), {key: `copy-${turn.id}`}),
      button("Fork", "fork", () => this._fork(turn), {key: `fork-${turn.id}`, title: "Begin another conversation with the turns up to here"}),
    ];
    if (turn.role === "tool") actions.splice(0, 1);
    const model = this._app.modelNamed(turn.model);
    const facts = turn.role === "assistant" && turn.model ? factsOf(turn, model?.max_model_len) : [];
    return element(
      "footer",
      {},
      element("span", {class: "actions"}, ...actions),
      facts.length ? element("span", {class: "facts"}, facts.join(" · ")) : null,
    );
  }

  _remedies(turn) {
    const again = button("Try again", "again", () => this.regenerate(turn));
    return turn.status === 401 ? [button("Give the key", "key", () => this._app.askKey()), again] : [again];
  }

  // Editing

  _edit(turn) {
    if (turn.role === "tool") return;
    this._editing = turn.id;
    this._drawTurns();
    this._turns.querySelector(".editor textarea")?.focus();
  }

  _editor(turn) {
    const isUser = turn.role === "user";
    const area = element("textarea", {value: turn.content, "aria-label": `Text of the turn`, oninput: () => grow(area)});
    const save = () => {
      this._editing = null;
      const parent = turn.parent || null;
      if (isUser) {
        this._ask(addTurn(this._conversation, parent, {role: "user", content: area.value}));
      } else {
        addTurn(this._conversation, parent, {role: "assistant", content: area.value, calls: turn.calls ?? [], edited: true});
        this._app.saveConversation(this._conversation);
        this._drawTurns();
      }
    };
    const cancel = () => {
      this._editing = null;
      this._drawTurns();
      this._turns.querySelector(`[data-turn="${turn.id}"]`)?.focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        cancel();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        save();
      }
    });
    requestAnimationFrame(() => grow(area));
    return element(
      "div",
      {class: "editor"},
      area,
      element("div", {class: "row"}, button(isUser ? "Send as a new version" : "Keep as a new version", "check", save, {class: "primary"}), button("Cancel", null, cancel)),
    );
  }

  _fork(turn) {
    this._app.open(forked(this._conversation, turn));
    announce("A new conversation begins with the turns up to here");
  }

  // Results of calls

  _resultForm(turn) {
    const areas = turn.calls.map((call, index) => element("textarea", {rows: 2, id: `result-${turn.id}-${index}`, placeholder: "Text or JSON; may stay empty"}));
    return element(
      "form",
      {class: "results", onsubmit: (event) => {
        event.preventDefault();
        const results = turn.calls.map((call, index) => ({id: call.id, content: areas[index].value}));
        this._ask(addTurn(this._conversation, turn.id, {role: "tool", results}));
      }},
      ...turn.calls.map((call, index) => element("div", {}, element("label", {for: areas[index].id}, `Result of ${call.name}`), areas[index])),
      element("button", {type: "submit", class: "primary"}, turn.calls.length > 1 ? "Send results" : "Send result"),
    );
  }

  // Asking

  /** Sends what is in the field as the next turn. */
  send() {
    const content = this._field.value;
    if (!content.trim() || this.isRunning) return;
    const last = shownTurns(this._conversation).at(-1);
    if (last?.calls?.length) return this._say("The calls of the last turn wait for their results.");
    if (last?.role === "assistant" && !last.content) return this._say("The last answer is empty. Ask for it again, or edit it.");
    this._say("");
    this._field.value = "";
    this._app.draft = "";
    grow(this._field);
    const isUnanswered = last && last.role !== "assistant"; // a turn whose answer was never asked for
    this._ask(addTurn(this._conversation, (isUnanswered ? last.parent : last?.id) || null, {role: "user", content}));
  }

  /** Asks for another answer beside `turn`; one that failed without text goes. */
  regenerate(turn) {
    if (this.isRunning) return;
    const asked = this._conversation.turns[turn.parent];
    if (!asked) return;
    if (turn.error && !turn.content) removeTurn(this._conversation, turn);
    this._ask(asked);
  }

  stop() {
    this._running?.controller.abort();
  }

  _say(words) {
    this._hint.textContent = words;
    if (words) announce(words);
  }

  /** Streams the answer to a turn. */
  async _ask(asked) {
    if (this.isRunning) return;
    const conversation = this._conversation;
    const {settings} = this._app;
    const others = Object.values(conversation.turns).filter((turn) => turn.parent === asked.id).length;
    const body = {
      model: settings.model,
      messages: messagesOf(conversation.system, turnsUpTo(conversation, asked)),
      // Another answer with the same seed would be the same answer.
      ...samplingOf(settings, isNumber(settings.seed) ? others : 0),
      ...toolFields(conversation),
    };
    const turn = addTurn(conversation, asked.id, {role: "assistant", ...newAnswer(body)});
    const controller = new AbortController();
    this._running = {turn, controller};
    this._drawTurns();
    this._drawButton();
    this._toEnd();
    this._app.saveConversation(conversation);
    announce("The answer begins");

    let isDrawn = true;
    await streamChat(this._app.api, body, turn, controller.signal, () => {
      if (!isDrawn) return;
      isDrawn = false;
      requestAnimationFrame(() => {
        isDrawn = true;
        this._drawGrowth(turn);
      });
    });
    this._running = null;
    if (turn.status === 401) this._app.askKey();
    this._app.saveConversation(conversation);
    if (!this._button.isConnected) return;
    const follows = this._isNearEnd();
    this._drawTurns();
    this._drawButton();
    if (follows) this._toEnd();
    announce(turn.error ?? `${turn.stopped ? "Stopped" : "Answer"}: ${turn.content || "calls"}`);
  }

  _drawGrowth(turn) {
    const body = this._bodies.get(turn.id);
    if (this._running?.turn !== turn || !body?.isConnected) return;
    const follows = this._isNearEnd();
    // The tokens of a growing answer are drawn when it is complete: they would take the focus away.
    if ((this._modes[turn.id] ?? "text") === "text") this._fill(body, turn, true);
    if (follows) this._toEnd();
  }

  _isNearEnd() {
    const {scrollHeight, scrollTop, clientHeight} = this._turns;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  _toEnd() {
    if (this._turns) this._turns.scrollTop = this._turns.scrollHeight;
  }

  // Keys

  get shortcuts() {
    const at = (action) => () => {
      const turn = this._turnInFocus();
      if (turn) action(turn);
    };
    const flip = (mode) => at((turn) => turn.role === "assistant" && this._show(turn, this._modes[turn.id] === mode ? "text" : mode));
    return [
      {keys: "/", words: "write a message", run: () => this._field.focus()},
      {keys: "Escape", words: "stop the answer", run: () => this.stop()},
      {keys: "n", words: "new conversation", run: () => this._app.openNew()},
      {keys: "j", words: "next turn", run: () => this._moveFocus(1)},
      {keys: "k", words: "turn before", run: () => this._moveFocus(-1)},
      {keys: "e", words: "edit the turn", run: at((turn) => this._edit(turn))},
      {keys: "r", words: "ask for another answer", run: at((turn) => turn.role === "assistant" && this.regenerate(turn))},
      {keys: "[", words: "earlier version of the turn", run: at((turn) => this._step(turn, -1))},
      {keys: "]", words: "later version of the turn", run: at((turn) => this._step(turn, 1))},
      {keys: "f", words: "fork the conversation behind the turn", run: at((turn) => this._fork(turn))},
      {keys: "c", words: "copy the turn", run: at((turn) => copyText(textOf(turn)))},
      {keys: "t", words: "tokens by probability", run: flip("tokens")},
      {keys: "w", words: "raw request and answer", run: flip("raw")},
    ];
  }

  /** Returns the turn that has the focus, or else the last one. */
  _turnInFocus() {
    const id = document.activeElement?.closest(".turn")?.dataset.turn;
    return this._conversation.turns[id] ?? shownTurns(this._conversation).at(-1);
  }

  _moveFocus(by) {
    const nodes = [...this._turns.querySelectorAll(".turn")];
    const at = nodes.indexOf(document.activeElement?.closest(".turn"));
    const next = at < 0 ? nodes.length - 1 : Math.min(nodes.length - 1, Math.max(0, at + by));
    nodes[next]?.focus();
  }
}

function textOf(turn) {
  if (turn.role === "tool") return turn.results.map((result) => result.content).join("\n");
  const calls = (turn.calls ?? []).map((call) => `${call.name}(${call.arguments})`);
  return [turn.content, ...calls].filter(Boolean).join("\n");
}
