// Two answers to one prompt, of two models or of one with two settings, side by side. The better one is chosen, and the
// choices are a file of rankings.

import {factsOf, newAnswer, samplingOf, streamChat} from "./answer.js";
import {announce, button, download, element, errorBox, grow} from "./dom.js";
import {drawMarkdown} from "./markdown.js";
import {linesOf, loadRankings, obstacle, rankingOf, saveRankings} from "./rankings.js";
import {modelField, samplingFields} from "./settings.js";
import {load, save} from "./store.js";
import {tokenView} from "./tokens.js";
import {messagesOf} from "./tree.js";

const NAME = "compare";
const SIDES = ["A", "B"];

export class CompareView {
  constructor(app) {
    this._app = app;
    const kept = load(NAME, {});
    this._system = kept.system ?? "";
    this._turns = kept.turns ?? []; // answered before, with the better answers
    this._prompt = kept.prompt ?? "";
    this._draft = kept.draft ?? "";
    this._sides = kept.sides ?? [{}, {}]; // settings with a model
    this._answers = kept.answers ?? [null, null];
    this._order = kept.order ?? [0, 1]; // which settings stand at A and at B
    this._isBlind = kept.isBlind ?? false;
    this._better = kept.better ?? null; // index in `_order` of the chosen answer
    this._rankings = loadRankings();
    this._controller = null;
    this._showsTokens = false;
    // An answer that was under way when the page was closed will not go on.
    for (const answer of this._answers) if (answer && !answer.finish && !answer.error) answer.stopped = true;
  }

  get isRunning() {
    return this._controller !== null;
  }

  _save() {
    const slim = this._answers.map((answer) => answer && {...answer, promptIds: undefined});
    save(NAME, {system: this._system, turns: this._turns, prompt: this._prompt, draft: this._draft, sides: this._sides,
      answers: slim, order: this._order, isBlind: this._isBlind, better: this._better});
  }

  draw(container) {
    this._container = container;
    for (const side of this._sides) side.model = this._app.modelNamed(side.model) ? side.model : this._app.settings.model;
    this._columns = SIDES.map((_, index) => element("section", {class: "side", "aria-label": `Answer ${SIDES[index]}`}));
    this._status = element("div", {class: "row choices"});
    this._problem = element("div");
    container.replaceChildren(
      element("h2", {class: "only-heard"}, "Compare two answers"),
      element("div", {class: "compare"}, this._setup(), this._asked(), element("div", {class: "sides"}, ...this._columns), this._problem),
      element("div", {class: "foot"}, this._composer(), this._status),
    );
    SIDES.forEach((_, index) => this._drawSide(index));
    this._drawStatus();
    grow(this._field);
  }

  // What is asked of whom

  _setup() {
    const columns = this._sides.map((side, index) => {
      const model = modelField(this._app.models, side.model, (name) => {
        side.model = name;
        this._save();
      }, {id: `compare-model-${index}`});
      return element(
        "fieldset",
        {},
        element("legend", {}, `Settings ${index + 1}`),
        element("label", {class: "field"}, element("span", {class: "label"}, "Model"), model),
        samplingFields(side, `compare-${index}`, () => this._save()),
      );
    });
    const system = element("textarea", {id: "compare-system", rows: 2, value: this._system, placeholder: "None", oninput: () => {
      this._system = system.value;
      this._save();
    }});
    const blind = element("input", {type: "checkbox", checked: this._isBlind, onchange: () => {
      this._isBlind = blind.checked;
      this._save();
    }});
    return element(
      "details",
      {class: "setup", open: !this._prompt},
      element("summary", {}, "Who answers, and how"),
      element("div", {class: "sides"}, ...columns),
      element("label", {class: "wide-field", for: "compare-system"}, element("span", {class: "label"}, "System prompt of both"), system),
      element("label", {class: "check"}, blind, " hide who is who until I have chosen"),
    );
  }

  _asked() {
    const turns = [...this._turns];
    if (this._prompt) turns.push({role: "user", content: this._prompt});
    if (!turns.length) {
      return element("p", {class: "welcome muted"}, "Write a prompt: two answers come side by side. Choose the better one, and the choices become a file that a reward model learns from.");
    }
    const nodes = turns.map(({role, content}) => {
      const text = element("div", {class: "body-text"});
      if (role === "assistant") drawMarkdown(text, content);
      else text.append(element("p", {class: "plain"}, content));
      return element("article", {class: `turn ${role}`}, element("header", {}, element("h3", {}, role === "user" ? "You" : "The better answer")), text);
    });
    return element("div", {class: "asked"}, ...nodes);
  }

  _composer() {
    this._field = element("textarea", {
      id: "compare-prompt",
      rows: 1,
      placeholder: this._invitation,
      "aria-label": "Prompt for both",
      value: this._draft,
      oninput: () => {
        grow(this._field);
        this._draft = this._field.value;
        this._save();
      },
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        this.send();
      },
    });
    this._button = element("button", {type: "submit", class: "send"});
    this._drawButton();
    return element("form", {class: "composer", onsubmit: (event) => {
      event.preventDefault();
      if (this.isRunning) this.stop();
      else this.send();
    }}, this._field, this._button);
  }

  get _invitation() {
    return this._better === null ? "A prompt for both" : "Go on from the better one";
  }

  _drawButton() {
    const words = this.isRunning ? "Stop" : "Ask both";
    this._button.replaceChildren(...button(words, this.isRunning ? "stop" : "send", () => {}).childNodes);
    this._button.classList.toggle("stops", this.isRunning);
  }

  // Answers

  _drawSide(index) {
    const column = this._columns[index];
    const answer = this._answers[index];
    if (!answer) {
      column.replaceChildren();
      column.hidden = true;
      return;
    }
    column.hidden = false;
    const isChosen = this._better === index;
    column.classList.toggle("better", isChosen);
    column.setAttribute("aria-busy", String(this.isRunning && !answer.isComplete));
    const body = element("div", {class: "body-text"});
    column.body = body;
    if (this._showsTokens && !this.isRunning) body.append(tokenView(answer.tokens));
    else drawMarkdown(body, answer.content);

    const isHidden = this._isBlind && this._better === null;
    const name = isHidden ? "" : ` · ${answer.model}`;
    const facts = [...factsOf(answer).slice(1), `seed ${answer.request.seed}`].join(" · ");
    column.replaceChildren(
      element("header", {}, element("h3", {}, `Answer ${SIDES[index]}`, element("span", {class: "muted"}, name)), isChosen ? element("span", {class: "badge"}, "better") : ""),
      body,
      answer.error ? errorBox(answer.error) : "",
      element("footer", {}, isHidden ? "" : element("span", {class: "facts"}, facts)),
      this._better === null ? this._betterButton(index) : "",
    );
  }

  _betterButton(index) {
    return button(`${SIDES[index]} is better`, "check", () => this.choose(index), {
      class: "primary choose",
      disabled: this.isRunning || this._obstacle() !== "",
    });
  }

  /** Returns why nothing can be chosen; empty: it can. */
  _obstacle() {
    if (this._answers.some((answer) => !answer)) return "no answers";
    if (this._answers.some((answer) => answer.error)) return "An answer failed: ask again.";
    if (this._answers.some((answer) => answer.stopped)) return "An answer was stopped before its end: ask again.";
    return obstacle(this._answers);
  }

  _drawStatus() {
    const count = this._rankings.length;
    const isReady = !this.isRunning && this._answers.every(Boolean);
    const problem = isReady && this._better === null ? this._obstacle() : "";
    const cut = isReady && !problem && this._answers.some((answer) => answer.finish === "length") ? "An answer was cut off by its limit of tokens. " : "";
    this._problem.replaceChildren(problem || cut ? element("p", {class: "muted notice"}, problem || cut) : "");
    this._status.replaceChildren(
      element("span", {class: "muted"}, count ? `${count} choice${count === 1 ? "" : "s"} kept` : ""),
      count ? button("Save as .jsonl", "download", () => this._download(), {id: "save-rankings"}) : "",
      count ? this._clearButton(count) : "",
      element("span", {class: "spring"}),
      isReady ? button(this._showsTokens ? "Text" : "Tokens", null, () => this._flipTokens()) : "",
      isReady ? button("Ask again", "again", () => this._ask(), {class: "optional"}) : "",
      this._better !== null || this._turns.length ? button("New prompt", "plus", () => this._new(), {class: "optional"}) : "",
    );
  }

  _clearButton(count) {
    // A second press deletes: what people have chosen cannot be made again.
    const clear = button("Delete", "trash", () => {
      if (clear.dataset.sure) {
        this._rankings = [];
        saveRankings(this._rankings);
        this._drawStatus();
        announce("The choices are deleted");
        return;
      }
      clear.dataset.sure = "1";
      clear.classList.remove("optional");
      clear.lastChild.textContent = `Delete ${count} for good?`;
    });
    clear.classList.add("optional");
    clear.addEventListener("blur", () => {
      delete clear.dataset.sure;
      clear.classList.add("optional");
      clear.lastChild.textContent = "Delete";
    });
    return clear;
  }

  _flipTokens() {
    this._showsTokens = !this._showsTokens;
    SIDES.forEach((_, index) => this._drawSide(index));
    this._drawStatus();
  }

  // Asking

  send() {
    const content = this._field.value;
    if (!content.trim() || this.isRunning) return;
    // After a choice the conversation goes on with the better answer.
    if (this._better !== null) {
      const better = this._answers[this._better].content;
      this._turns.push({role: "user", content: this._prompt}, {role: "assistant", content: better});
    }
    this._prompt = content;
    this._draft = "";
    this._ask();
  }

  stop() {
    this._controller?.abort();
  }

  _new() {
    this.stop();
    Object.assign(this, {_turns: [], _prompt: "", _answers: [null, null], _better: null});
    this._save();
    this.draw(this._container);
    this._field.focus();
  }

  async _ask() {
    if (this.isRunning) return;
    this._better = null;
    this._order = this._isBlind && crypto.getRandomValues(new Uint8Array(1))[0] % 2 ? [1, 0] : [0, 1];
    this._messages = messagesOf(this._system, [...this._turns, {role: "user", content: this._prompt}]);
    const bodies = this._order.map((side) => {
      return {model: this._sides[side].model, messages: this._messages, ...samplingOf(this._sides[side])};
    });
    this._answers = bodies.map((body) => ({...newAnswer(body), messages: this._messages}));
    this._controller = new AbortController();
    this.draw(this._container);
    this._scrollToAnswers();
    this._save();
    announce("Both answers begin");

    const {signal} = this._controller;
    await Promise.all(bodies.map(async (body, index) => {
      const answer = this._answers[index];
      let isDrawn = true;
      await streamChat(this._app.api, body, answer, signal, () => {
        if (!isDrawn) return;
        isDrawn = false;
        requestAnimationFrame(() => {
          isDrawn = true;
          if (this.isRunning && this._columns[index].isConnected) drawMarkdown(this._columns[index].body, answer.content);
        });
      });
      answer.isComplete = true;
    }));
    this._controller = null;
    if (this._answers.some((answer) => answer.status === 401)) this._app.askKey();
    this._save();
    if (!this._button.isConnected) return;
    this._drawButton();
    SIDES.forEach((_, index) => this._drawSide(index));
    this._drawStatus();
    announce(`Answer A: ${this._answers[0].content}. Answer B: ${this._answers[1].content}`);
  }

  _scrollToAnswers() {
    this._columns[0].scrollIntoView({block: "nearest"});
  }

  /** Keeps the choice of an answer. */
  choose(index) {
    if (this.isRunning || this._better !== null || this._obstacle()) return;
    const {messages} = this._answers[index];
    const ranking = rankingOf(messages, this._answers.map((answer) => answer.content), index);
    const rankings = [...loadRankings(), ranking]; // another tab may have kept some
    if (!saveRankings(rankings)) {
      this._problem.replaceChildren(errorBox("The browser has no space for more choices: save them as a file, then delete them."));
      return;
    }
    this._rankings = rankings;
    this._better = index;
    this._save();
    SIDES.forEach((_, side) => this._drawSide(side));
    this._drawStatus();
    this._field.placeholder = this._invitation;
    this._field.focus({preventScroll: true});
    announce(`${SIDES[index]} is better: kept`);
  }

  _download() {
    this._rankings = loadRankings();
    download("rankings.jsonl", linesOf(this._rankings), "application/jsonl");
  }

  get shortcuts() {
    return [
      {keys: "/", words: "write a prompt", run: () => this._field.focus()},
      {keys: "Escape", words: "stop both answers", run: () => this.stop()},
      {keys: "a", words: "A is better", run: () => this.choose(0)},
      {keys: "b", words: "B is better", run: () => this.choose(1)},
      {keys: "r", words: "ask both again", run: () => this._prompt && this._ask()},
      {keys: "t", words: "tokens by probability", run: () => this._flipTokens()},
      {keys: "n", words: "new prompt", run: () => this._new()},
    ];
  }
}
