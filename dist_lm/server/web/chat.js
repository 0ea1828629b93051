// The view of a conversation: draws its turns, asks for answers and keeps them in the tree.

import {isNumber, newAnswer, samplingOf, streamChat} from "./answer.js";
import {Composer} from "./composer.js";
import {announce, copyText, element, grow, redraw} from "./dom.js";
import {toolFields} from "./settings.js";
import {addTurn, choose, forked, messagesOf, removeTurn, shownTurns, siblingsOf, turnsUpTo} from "./tree.js";
import {drawAnswer, textOf, turnNode} from "./turn.js";

const NEAR_END = 80; // pixels: who is that near to the end follows the answer

export class ChatView {
  constructor(app) {
    this._app = app;
    this._modes = {}; // by id of a turn: how its answer is shown
    this._editedId = null; // of the turn that is being edited
    this._running = null; // {turn, controller}
    this._actions = {
      step: (turn, by) => this._step(turn, by),
      show: (turn, mode) => this._show(turn, mode),
      edit: (turn) => this._edit(turn),
      keepEdit: (turn, text) => this._keepEdit(turn, text),
      cancelEdit: (turn) => this._cancelEdit(turn),
      regenerate: (turn) => this.regenerate(turn),
      fork: (turn) => this._fork(turn),
      sendResults: (turn, results) => this._ask(addTurn(this._conversation, turn.id, {role: "tool", results})),
      askKey: () => app.askKey(),
    };
  }

  get isRunning() {
    return this._running !== null;
  }

  get _conversation() {
    return this._app.conversation;
  }

  // Drawing

  /** Draws the whole view. */
  draw(container) {
    this._turns = element("div", {
      class: "turns",
      role: "region",
      tabindex: "0",
      "aria-label": "Conversation",
      "data-focus": "turns",
    });
    this._hint = element("p", {class: "hint", id: "composer-hint"});
    this._composer = new Composer({
      id: "composer",
      label: "Message",
      placeholder: "Write a message",
      describedBy: "composer-hint",
      value: this._app.draft,
      words: "Send",
      onInput: (text) => (this._app.draft = text),
      onSend: () => this.send(),
      onStop: () => this.stop(),
    });
    this._composer.isRunning = this.isRunning;
    container.replaceChildren(
      element("h2", {class: "only-heard"}, "Chat"),
      this._turns,
      element("div", {class: "foot"}, this._composer.node, this._hint),
    );
    this._drawTurns();
    grow(this._composer.field);
    this._toEnd();
  }

  /** Draws the turns again, and keeps focus and place. */
  _drawTurns() {
    if (!this._turns?.isConnected) return;
    const place = this._turns.scrollTop;
    const hadFocus = this._turns.contains(document.activeElement);
    redraw(this._turns, () => this._turns.replaceChildren(...this._nodes()));

    // What had the focus may be gone, such as the form of a result: the answer that it led to has it now.
    if (hadFocus && !this._turns.contains(document.activeElement)) {
      this._turns.querySelector(".turn:last-of-type")?.focus();
    }
    this._turns.scrollTop = place;
    this._app.conversationChanged();
  }

  _nodes() {
    const turns = shownTurns(this._conversation);
    if (!turns.length) return [this._welcome()];
    const nodes = turns.map((turn) => {
      const state = {
        conversation: this._conversation,
        mode: this._modes[turn.id] ?? "text",
        isRunning: this._running?.turn === turn,
        isEdited: this._editedId === turn.id,
        isLast: turn === turns.at(-1),
        contextLength: this._app.modelNamed(turn.model)?.max_model_len,
      };
      return turnNode(turn, state, this._actions);
    });
    const {system} = this._conversation;
    if (!system.trim()) return nodes;
    return [element("p", {class: "system"}, element("span", {class: "label"}, "System prompt"), system), ...nodes];
  }

  _welcome() {
    const count = this._conversation.tools.length;
    const keys = "Enter sends, Shift+Enter begins a line.";
    const versions = "Edit a turn, ask again, or fork from any point: nothing gets lost.";
    const tools = `The model can call ${count} tool${count === 1 ? "" : "s"}.`;
    return element(
      "div",
      {class: "welcome"},
      element("p", {class: "big"}, "Talk to ", element("b", {}, this._app.settings.model || "the model")),
      element("p", {class: "muted"}, `${keys} ${versions}`),
      count ? element("p", {class: "muted"}, tools) : null,
    );
  }

  /** Draws what an answer has grown by. */
  _drawGrowth(turn) {
    if (this._running?.turn !== turn) return;
    const body = this._turns.querySelector(`[data-turn="${turn.id}"] .body-text`);
    // The tokens of a growing answer are drawn when it is complete: they would take the focus away.
    if (!body || (this._modes[turn.id] ?? "text") !== "text") return;
    const follows = this._isNearEnd();
    drawAnswer(body, turn, true);
    if (follows) this._toEnd();
  }

  _isNearEnd() {
    const {scrollHeight, scrollTop, clientHeight} = this._turns;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  _toEnd() {
    this._turns.scrollTop = this._turns.scrollHeight;
  }

  _say(words) {
    this._hint.textContent = words;
    if (words) announce(words);
  }

  // What can be done with a turn

  _step(turn, by) {
    const siblings = siblingsOf(this._conversation, turn);
    const next = siblings[siblings.indexOf(turn) + by];
    if (!next) return;
    choose(this._conversation, next);
    this._app.saveConversation(this._conversation);
    this._drawTurns();
    announce(`Version ${siblings.indexOf(next) + 1} of ${siblings.length}`);
  }

  _show(turn, mode) {
    this._modes[turn.id] = mode;
    this._drawTurns();
  }

  _edit(turn) {
    if (turn.role === "tool") return;
    this._editedId = turn.id;
    this._drawTurns();
    this._turns.querySelector(".editor textarea")?.focus();
  }

  _keepEdit(turn, content) {
    this._editedId = null;
    const parent = turn.parent || null;
    if (turn.role === "user") {
      this._ask(addTurn(this._conversation, parent, {role: "user", content}));
      return;
    }
    addTurn(this._conversation, parent, {role: "assistant", content, calls: turn.calls ?? [], edited: true});
    this._app.saveConversation(this._conversation);
    this._drawTurns();
  }

  _cancelEdit(turn) {
    this._editedId = null;
    this._drawTurns();
    this._turns.querySelector(`[data-turn="${turn.id}"]`)?.focus();
  }

  _fork(turn) {
    this._app.open(forked(this._conversation, turn));
    announce("A new conversation begins with the turns up to here");
  }

  /** Asks for another answer beside `turn`; one that failed without text goes. */
  regenerate(turn) {
    const asked = this._conversation.turns[turn.parent];
    if (this.isRunning || !asked) return;
    if (turn.error && !turn.content) removeTurn(this._conversation, turn);
    this._ask(asked);
  }

  // Asking

  /** Sends what is in the field as the next turn. */
  send() {
    const content = this._composer.text;
    if (!content.trim() || this.isRunning) return;
    const last = shownTurns(this._conversation).at(-1);
    const obstacle = obstacleBehind(last);
    this._say(obstacle);
    if (obstacle) return;

    this._composer.text = "";
    // A turn whose answer was never asked for is replaced: two turns of the user cannot follow each other.
    const parent = last?.role === "user" ? last.parent : last?.id;
    this._ask(addTurn(this._conversation, parent || null, {role: "user", content}));
  }

  stop() {
    this._running?.controller.abort();
  }

  /** Streams the answer to a turn. */
  async _ask(asked) {
    if (this.isRunning) return;
    const conversation = this._conversation;
    const body = this._requestBody(asked);
    const turn = addTurn(conversation, asked.id, {role: "assistant", ...newAnswer(body)});
    const controller = new AbortController();
    this._running = {turn, controller};
    this._drawTurns();
    this._composer.isRunning = true;
    this._toEnd();
    this._app.saveConversation(conversation);
    announce("The answer begins");

    // Events come faster than the screen is drawn.
    let isFrameAsked = false;
    await streamChat(this._app.api, body, turn, controller.signal, () => {
      if (isFrameAsked) return;
      isFrameAsked = true;
      requestAnimationFrame(() => {
        isFrameAsked = false;
        this._drawGrowth(turn);
      });
    });
    this._running = null;
    this._app.saveConversation(conversation);
    if (turn.status === 401) this._app.askKey();
    if (this._composer.isConnected) this._finish(turn);
  }

  _finish(turn) {
    const follows = this._isNearEnd();
    this._drawTurns();
    this._composer.isRunning = false;
    if (follows) this._toEnd();
    const names = turn.calls.map((call) => `call of ${call.name}`);
    const said = [turn.content, ...names].filter(Boolean).join(", ");
    announce(turn.error ?? `${turn.stopped ? "Stopped" : "Answer"}: ${said || "empty"}`);
  }

  _requestBody(asked) {
    const conversation = this._conversation;
    const {settings} = this._app;
    // Another answer with the same seed would be the same answer.
    const others = Object.values(conversation.turns).filter((turn) => turn.parent === asked.id).length;
    return {
      model: settings.model,
      messages: messagesOf(conversation.system, turnsUpTo(conversation, asked)),
      ...samplingOf(settings, isNumber(settings.seed) ? others : 0),
      ...toolFields(conversation),
    };
  }

  // Keys

  get shortcuts() {
    const at = (action) => () => {
      const turn = this._turnInFocus();
      if (turn) action(turn);
    };
    const atAnswer = (action) => at((turn) => turn.role === "assistant" && action(turn));
    const flip = (mode) => atAnswer((turn) => this._show(turn, this._modes[turn.id] === mode ? "text" : mode));
    return [
      {keys: "/", words: "write a message", run: () => this._composer.field.focus()},
      {keys: "Escape", words: "stop the answer", run: () => this.stop()},
      {keys: "n", words: "new conversation", run: () => this._app.openNew()},
      {keys: "j", words: "next turn", run: () => this._moveFocus(1)},
      {keys: "k", words: "turn before", run: () => this._moveFocus(-1)},
      {keys: "e", words: "edit the turn", run: at((turn) => this._edit(turn))},
      {keys: "r", words: "ask for another answer", run: atAnswer((turn) => this.regenerate(turn))},
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

/** Returns why no message can follow a turn, as a sentence; empty: one can. */
function obstacleBehind(turn) {
  if (turn?.calls?.length) return "The calls of the last turn wait for their results.";
  if (turn?.role === "assistant" && !turn.content) return "The last answer is empty. Ask for it again, or edit it.";
  if (turn?.role === "tool") return "The results wait for an answer. Go back to the calls and send them again.";
  return "";
}
