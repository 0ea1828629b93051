// Two answers to one prompt, of two models or of one with two settings, side by side. The better one is chosen, and the
// choices are a file of rankings.

import {factsOf, newAnswer, samplingOf, streamChat} from "./answer.js";
import {comparisonSetup} from "./compare_setup.js";
import {Composer} from "./composer.js";
import {announce, button, download, element, errorBox, grow} from "./dom.js";
import {drawMarkdown} from "./markdown.js";
import {linesOf, loadRankings, obstacle, rankingOf, saveRankings} from "./rankings.js";
import {load, save} from "./store.js";
import {tokenView} from "./tokens.js";
import {messagesOf} from "./tree.js";

const NAME = "compare";
const SIDES = ["A", "B"];
const EMPTY = {
  system: "",
  sides: [{}, {}], // settings with a model
  isBlind: false,
  turns: [], // prompts that were answered before, each with its better answer
  prompt: "",
  draft: "",
  answers: [null, null], // in the order in which they are shown
  better: null, // index of the chosen answer
};

export class CompareView {
  constructor(app) {
    this._app = app;
    this._comparison = {...structuredClone(EMPTY), ...load(NAME, {})};
    this._rankings = loadRankings();
    this._controller = null;
    this._showsTokens = false;

    // An answer that was under way when the page was closed will not go on.
    for (const answer of this._comparison.answers) {
      if (answer && !answer.finish && !answer.error) answer.stopped = true;
    }
  }

  get isRunning() {
    return this._controller !== null;
  }

  _save() {
    const answers = this._comparison.answers.map((answer) => answer && {...answer, promptIds: undefined});
    save(NAME, {...this._comparison, answers});
  }

  // Drawing

  draw(container) {
    const comparison = this._comparison;
    this._container = container;
    for (const side of comparison.sides) {
      if (!this._app.modelNamed(side.model)) side.model = this._app.settings.model;
    }
    this._columns = SIDES.map((side) => element("section", {class: "side", "aria-label": `Answer ${side}`}));
    this._problem = element("div");
    this._status = element("div", {class: "row choices"});
    this._composer = new Composer({
      id: "compare-prompt",
      label: "Prompt for both",
      placeholder: this._invitation,
      value: comparison.draft,
      words: "Ask both",
      onInput: (text) => {
        comparison.draft = text;
        this._save();
      },
      onSend: () => this.send(),
      onStop: () => this.stop(),
    });
    this._composer.isRunning = this.isRunning;
    const setup = comparisonSetup(comparison, this._app.models, !comparison.prompt, () => this._save());
    container.replaceChildren(
      element("h2", {class: "only-heard"}, "Compare two answers"),
      element(
        "div",
        {class: "compare"},
        setup,
        this._asked(),
        element("div", {class: "sides"}, ...this._columns),
        this._problem,
      ),
      element("div", {class: "foot"}, this._composer.node, this._status),
    );
    this._drawAnswers();
    grow(this._composer.field);
  }

  get _invitation() {
    return this._comparison.better === null ? "A prompt for both" : "Go on from the better one";
  }

  /** Returns the node with the turns that both answers follow. */
  _asked() {
    const {turns, prompt} = this._comparison;
    if (!prompt) {
      const invitation = "Write a prompt: two answers come side by side.";
      const purpose = "Choose the better one, and the choices become a file that a reward model learns from.";
      return element("p", {class: "welcome muted"}, `${invitation} ${purpose}`);
    }
    const nodes = [...turns, {role: "user", content: prompt}].map(({role, content}) => {
      const text = element("div", {class: "body-text"});
      if (role === "assistant") drawMarkdown(text, content);
      else text.append(element("p", {class: "plain"}, content));
      const name = role === "user" ? "You" : "The better answer";
      return element("article", {class: `turn ${role}`}, element("header", {}, element("h3", {}, name)), text);
    });
    return element("div", {class: "asked"}, ...nodes);
  }

  _drawAnswers() {
    SIDES.forEach((_, index) => this._drawAnswer(index));
    this._drawStatus();
  }

  _drawAnswer(index) {
    const {answers, better, isBlind} = this._comparison;
    const answer = answers[index];
    const column = this._columns[index];
    column.hidden = !answer;
    if (!answer) return;

    column.classList.toggle("better", better === index);
    column.setAttribute("aria-busy", String(this.isRunning && !answer.isComplete));
    column.text = element("div", {class: "body-text"});
    if (this._showsTokens && !this.isRunning) column.text.append(tokenView(answer.tokens));
    else drawMarkdown(column.text, answer.content);

    // Speed, length and seed would tell who is who, too.
    const isHidden = isBlind && better === null;
    const model = element("span", {class: "muted"}, isHidden ? "" : ` · ${answer.model}`);
    const facts = isHidden ? "" : [...factsOf(answer).slice(1), `seed ${answer.request.seed}`].join(" · ");
    column.replaceChildren(
      element(
        "header",
        {},
        element("h3", {}, `Answer ${SIDES[index]}`, model),
        better === index ? element("span", {class: "badge"}, "better") : null,
      ),
      column.text,
      ...(answer.error ? [errorBox(answer.error)] : []),
      element("footer", {}, element("span", {class: "facts"}, facts)),
      ...(better === null ? [this._betterButton(index)] : []),
    );
  }

  _betterButton(index) {
    return button(`${SIDES[index]} is better`, "check", () => this.choose(index), {
      class: "primary choose",
      disabled: this.isRunning || this._obstacle() !== "",
    });
  }

  /** Returns why nothing can be chosen, as a sentence; empty: it can. */
  _obstacle() {
    const {answers} = this._comparison;
    if (answers.some((answer) => answer.error)) return "An answer failed: ask again.";
    if (answers.some((answer) => answer.stopped)) return "An answer was stopped before its end: ask again.";
    return obstacle(answers);
  }

  _drawStatus() {
    const {answers, better, turns} = this._comparison;
    const count = this._rankings.length;
    const isReady = !this.isRunning && answers.every(Boolean);
    this._problem.replaceChildren(...(isReady && better === null ? this._remarks() : []));

    const nodes = [];
    if (count) {
      nodes.push(
        element("span", {class: "muted"}, `${count} choice${count === 1 ? "" : "s"} kept`),
        button("Save as .jsonl", "download", () => this._download()),
        this._clearButton(count),
      );
    }
    nodes.push(element("span", {class: "spring"}));
    if (isReady) {
      nodes.push(
        button(this._showsTokens ? "Text" : "Tokens", null, () => this._flipTokens()),
        button("Ask again", "again", () => this._ask(), {class: "optional"}),
      );
    }
    if (better !== null || turns.length) {
      nodes.push(button("New prompt", "plus", () => this._new(), {class: "optional"}));
    }
    this._status.replaceChildren(...nodes);
  }

  _remarks() {
    let words = this._obstacle();
    const isCut = this._comparison.answers.some((answer) => answer.finish === "length");
    if (!words && isCut) words = "An answer was cut off by its limit of tokens.";
    return words ? [element("p", {class: "muted notice"}, words)] : [];
  }

  _clearButton(count) {
    // A second press deletes: what people have chosen cannot be made again.
    let isSure = false;
    const clear = button("Delete", "trash", () => {
      if (isSure) {
        this._rankings = [];
        saveRankings(this._rankings);
        this._drawStatus();
        announce("The choices are deleted");
        return;
      }
      isSure = true;
      clear.classList.remove("optional");
      clear.lastChild.textContent = `Delete ${count} for good?`;
    }, {class: "optional"});
    clear.addEventListener("blur", () => {
      isSure = false;
      clear.classList.add("optional");
      clear.lastChild.textContent = "Delete";
    });
    return clear;
  }

  _flipTokens() {
    this._showsTokens = !this._showsTokens;
    this._drawAnswers();
  }

  // Asking

  send() {
    const comparison = this._comparison;
    const content = this._composer.text;
    if (!content.trim() || this.isRunning) return;

    // After a choice the conversation goes on with the better answer.
    if (comparison.better !== null) {
      const better = comparison.answers[comparison.better].content;
      comparison.turns.push({role: "user", content: comparison.prompt}, {role: "assistant", content: better});
    }
    comparison.prompt = content;
    comparison.draft = "";
    this._ask();
  }

  stop() {
    this._controller?.abort();
  }

  _new() {
    this.stop();
    Object.assign(this._comparison, {turns: [], prompt: "", answers: [null, null], better: null});
    this._save();
    this.draw(this._container);
    this._composer.field.focus();
  }

  async _ask() {
    if (this.isRunning || !this._comparison.prompt) return;
    const bodies = this._requestBodies();
    const answers = bodies.map((body) => ({...newAnswer(body), messages: body.messages}));
    Object.assign(this._comparison, {answers, better: null});
    this._controller = new AbortController();
    this.draw(this._container);
    this._columns[0].scrollIntoView({block: "nearest"});
    this._composer.field.focus({preventScroll: true});
    this._save();
    announce("Both answers begin");

    const {signal} = this._controller;
    await Promise.all(bodies.map((body, index) => this._stream(body, answers[index], index, signal)));
    this._controller = null;
    this._save();
    if (answers.some((answer) => answer.status === 401)) this._app.askKey();
    if (!this._composer.isConnected) return;
    this._composer.isRunning = false;
    this._drawAnswers();
    announce(`Answer A: ${answers[0].content}. Answer B: ${answers[1].content}`);
  }

  /** Returns the requests of both sides; where names are hidden, in an order that is drawn. */
  _requestBodies() {
    const {system, turns, prompt, sides, isBlind} = this._comparison;
    const messages = messagesOf(system, [...turns, {role: "user", content: prompt}]);
    const bodies = sides.map((side) => ({model: side.model, messages, ...samplingOf(side)}));
    const isSwapped = isBlind && crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
    return isSwapped ? bodies.reverse() : bodies;
  }

  async _stream(body, answer, index, signal) {
    let isFrameAsked = false;
    await streamChat(this._app.api, body, answer, signal, () => {
      if (isFrameAsked) return;
      isFrameAsked = true;
      requestAnimationFrame(() => {
        isFrameAsked = false;
        const isShown = this.isRunning && this._comparison.answers[index] === answer;
        if (isShown) drawMarkdown(this._columns[index].text, answer.content);
      });
    });
    answer.isComplete = true;
  }

  // Choices

  /** Keeps the choice of an answer. */
  choose(index) {
    const {answers, better} = this._comparison;
    const canChoose = !this.isRunning && better === null && answers.every(Boolean) && !this._obstacle();
    if (!canChoose) return;

    const completions = answers.map((answer) => answer.content);
    const ranking = rankingOf(answers[index].messages, completions, index);
    const rankings = [...loadRankings(), ranking]; // another tab may have kept some
    if (!saveRankings(rankings)) {
      const words = "The browser has no space for more choices: save them as a file, then delete them.";
      this._problem.replaceChildren(errorBox(words));
      return;
    }
    this._rankings = rankings;
    this._comparison.better = index;
    this._save();
    this._drawAnswers();
    this._composer.field.placeholder = this._invitation;
    this._composer.field.focus({preventScroll: true});
    announce(`${SIDES[index]} is better: kept`);
  }

  _download() {
    this._rankings = loadRankings();
    download("rankings.jsonl", linesOf(this._rankings), "application/jsonl");
  }

  get shortcuts() {
    return [
      {keys: "/", words: "write a prompt", run: () => this._composer.field.focus()},
      {keys: "Escape", words: "stop both answers", run: () => this.stop()},
      {keys: "a", words: "A is better", run: () => this.choose(0)},
      {keys: "b", words: "B is better", run: () => this.choose(1)},
      {keys: "r", words: "ask both again", run: () => this._ask()},
      {keys: "t", words: "tokens by probability", run: () => this._flipTokens()},
      {keys: "n", words: "new prompt", run: () => this._new()},
    ];
  }
}
