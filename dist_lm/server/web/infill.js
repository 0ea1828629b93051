// The view for text in the middle: what stands before and after is given, the model writes what is between.

import {factsOf, newAnswer, samplingOf, streamCompletion} from "./answer.js";
import {announce, button, copyText, element, errorBox} from "./dom.js";
import {load, save} from "./store.js";
import {tokenView} from "./tokens.js";

const NAME = "infill";

export class InfillView {
  constructor(app) {
    this._app = app;
    this._texts = {prefix: "", suffix: "", ...load(NAME, {})};
    this._answer = this._texts.answer ?? null;
    this._showsTokens = false;
    this._controller = null;
  }

  get isRunning() {
    return this._controller !== null;
  }

  _save() {
    const {prefix, suffix} = this._texts;
    const answer = this._answer && {...this._answer, promptIds: undefined};
    save(NAME, {prefix, suffix, answer});
  }

  // Drawing

  draw(container) {
    this._prefixArea = this._area("prefix", "Text before the gap");
    const suffixArea = this._area("suffix", "Text after the gap");
    this._middle = element("div", {class: "middle", role: "region", "aria-label": "The middle"});
    this._buttons = element("div", {class: "row"});
    container.replaceChildren(
      element("h2", {class: "only-heard"}, "Fill in the middle"),
      element(
        "div",
        {class: "infill"},
        element("span", {class: "label", "aria-hidden": "true"}, "Before"),
        this._prefixArea,
        this._middle,
        element("span", {class: "label", "aria-hidden": "true"}, "After"),
        suffixArea,
      ),
      element("div", {class: "foot"}, this._buttons),
    );
    this._drawAnswer();
  }

  _area(name, words) {
    return element("textarea", {
      id: `infill-${name}`,
      class: "code-area",
      spellcheck: "false",
      value: this._texts[name],
      "aria-label": words,
      placeholder: words,
      oninput: (event) => {
        this._texts[name] = event.target.value;
        this._save();
      },
    });
  }

  _drawAnswer() {
    const answer = this._answer;
    this._middle.setAttribute("aria-busy", String(this.isRunning));
    this._buttons.replaceChildren(...(this.isRunning ? [this._stopButton()] : this._answerButtons()));
    if (!answer) {
      const invitation = "Here the model writes what fits between the two texts (Ctrl+Enter).";
      this._middle.replaceChildren(element("p", {class: "muted"}, invitation));
      return;
    }
    this._middle.replaceChildren(
      this._content(answer),
      ...(answer.error ? [errorBox(answer.error)] : []),
      element("p", {class: "facts"}, this.isRunning ? "writing" : factsOf(answer).join(" · ")),
    );
  }

  _content(answer) {
    if (this.isRunning || answer.error) return element("pre", {class: "written", tabindex: "0"}, answer.content);
    if (this._showsTokens) return tokenView(answer.tokens);
    if (!answer.content) return element("p", {class: "muted"}, "(nothing)");
    return element("pre", {class: "written", tabindex: "0"}, answer.content);
  }

  _stopButton() {
    return button("Stop", "stop", () => this.stop(), {class: "stops"});
  }

  _answerButtons() {
    const words = this._answer ? "Fill in again" : "Fill in";
    const buttons = [button(words, "again", () => this.fill(), {class: "primary"})];
    if (!this._answer?.content) return buttons;
    const takeTitle = "Put the middle at the end of the text before";
    buttons.push(
      button("Take it", "check", () => this._take(), {title: takeTitle}),
      button("Copy", "copy", () => copyText(this._answer.content)),
      button(this._showsTokens ? "Text" : "Tokens", null, () => this._flip()),
    );
    return buttons;
  }

  _flip() {
    this._showsTokens = !this._showsTokens;
    this._drawAnswer();
  }

  // Asking

  /** Asks for the middle. */
  async fill() {
    if (this.isRunning) return;
    const {prefix, suffix} = this._texts;
    const body = {model: this._app.settings.model, prompt: prefix, suffix, ...samplingOf(this._app.settings)};
    const answer = newAnswer(body);
    this._answer = answer;
    this._controller = new AbortController();
    this._drawAnswer();
    await streamCompletion(this._app.api, body, answer, this._controller.signal, () => {
      const written = this._middle.querySelector(".written");
      if (written) written.textContent = answer.content;
    });
    this._controller = null;
    this._save();
    if (answer.status === 401) this._app.askKey();
    if (!this._middle.isConnected) return;
    this._drawAnswer();
    announce(answer.error ?? `The middle: ${answer.content || "nothing"}`);
  }

  stop() {
    this._controller?.abort();
  }

  /** Puts the middle behind the text before the gap, so that the next one follows it. */
  _take() {
    this._texts.prefix += this._answer.content;
    this._answer = null;
    this._save();
    this._drawAnswer();
    const end = this._texts.prefix.length;
    this._prefixArea.value = this._texts.prefix;
    this._prefixArea.focus();
    this._prefixArea.setSelectionRange(end, end);
    announce("The middle stands at the end of the text before the gap");
  }

  get shortcuts() {
    return [
      {keys: "/", words: "write the text before the gap", run: () => this._prefixArea.focus()},
      {keys: "Ctrl+Enter r", words: "fill in", run: () => this.fill()},
      {keys: "Escape", words: "stop", run: () => this.stop()},
      {keys: "t", words: "tokens by probability", run: () => this._flip()},
    ];
  }
}
